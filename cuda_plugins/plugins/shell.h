// What TensorRT's two plugin interfaces have in common: TensorRT's types and an op's, and plugin fields and a node's attributes.
// plugin_v3.cpp (TensorRT 10, 11, RTX) and plugin_v2.cpp (8.6) are each for the headers of their version, and empty with others.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "logger.h"
#include "op.h"
#include "shapes.h"

namespace qpass {

constexpr size_t kMostTensors = 16;  // of a node, on each side

inline std::optional<qpass_type> from_tensorrt(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return QPASS_FLOAT;
    case nvinfer1::DataType::kHALF: return QPASS_HALF;
    case nvinfer1::DataType::kINT8: return QPASS_INT8;
#if QPASS_TENSORRT >= 10
    case nvinfer1::DataType::kBF16: return QPASS_BFLOAT16;
#endif
    default: return std::nullopt;
  }
}

inline nvinfer1::DataType to_tensorrt(qpass_type type) {
  switch (type) {
    case QPASS_HALF: return nvinfer1::DataType::kHALF;
    case QPASS_INT8: return nvinfer1::DataType::kINT8;
#if QPASS_TENSORRT >= 10
    case QPASS_BFLOAT16: return nvinfer1::DataType::kBF16;
#endif
    default: return nvinfer1::DataType::kFLOAT;
  }
}

inline Tensor tensor_of(const nvinfer1::PluginTensorDesc& desc, const nvinfer1::Dims& dims, const void* data) {
  Tensor t;
  t.data = const_cast<void*>(data);
  t.type = from_tensorrt(desc.type).value_or(QPASS_FLOAT);
  t.rank = dims.nbDims;
  std::copy(dims.d, dims.d + dims.nbDims, t.dims);
  return t;
}

// Says of a tensor that it is there, where nobody reads it.
inline const void* somewhere() { return reinterpret_cast<const void*>(256); }

// The dims of tensors as TensorRT knows them when it builds.
struct Symbols {
  using Dim = const nvinfer1::IDimensionExpr*;
  Dim constant(int64_t value) const { return builder->constant(value); }
  Dim times(Dim dim, int64_t by) const { return make(nvinfer1::DimensionOperation::kPROD, dim, constant(by)); }
  Dim divided(Dim dim, int64_t by) const { return make(nvinfer1::DimensionOperation::kFLOOR_DIV, dim, constant(by)); }
  bool broadcastable(Dim, Dim) const { return true; }
  // A dim that is not known now is taken for the same as the other: an expression that says "or 1" would hide the shape from
  // TensorRT, which refuses what it cannot follow. Node::check sees numbers, and refuses what is not so.
  Dim broadcast(Dim a, Dim b) const {
    if (a->isConstant()) return a->getConstantValue() == 1 ? b : a;
    return b->isConstant() && b->getConstantValue() != 1 ? b : a;
  }
  bool equal(Dim, Dim) const { return true; }
  Dim make(nvinfer1::DimensionOperation op, Dim a, Dim b) const { return builder->operation(op, *a, *b); }

  nvinfer1::IExprBuilder* builder;
};

inline bool arity_fits(const Node& node, int inputs, int outputs) {
  if (inputs == int(node.inputs.size()) && outputs == int(node.outputs.size())) return true;
  report(std::string(node.op.name) + ": the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
         " outputs, but its attributes say " + std::to_string(node.inputs.size()) + " and " +
         std::to_string(node.outputs.size()));
  return false;
}

// The dims of every output by those of the inputs; false, and reported, where these do not fit.
inline bool solve_outputs(const Node& node, const std::vector<std::vector<Symbols::Dim>>& in, nvinfer1::IExprBuilder& builder,
    std::vector<nvinfer1::DimsExprs>* out) {
  Shapes<Symbols> shapes(node, Symbols{&builder});
  for (size_t i = 0; i < in.size(); ++i) {
    const Slot& slot = *node.inputs[i];
    if (!shapes.bind(slot, in[i])) {
      report(std::string(node.op.name) + ": " + slot.name + " has " + std::to_string(in[i].size()) +
             " dims, which do not fit [" + node.shape(slot) + "]");
      return false;
    }
  }
  for (const Slot* slot : node.outputs) {
    std::vector<Symbols::Dim> dims;
    if (!shapes.solve(*slot, &dims)) {
      report(std::string(node.op.name) + ": no input has the dims of its output " + slot->name);
      return false;
    }
    nvinfer1::DimsExprs solved;
    solved.nbDims = int32_t(dims.size());
    std::copy(dims.begin(), dims.end(), solved.d);
    out->push_back(solved);
  }
  return true;
}

inline nvinfer1::PluginFieldType type_of(const Field& field) {
  return field.is_float ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32;
}

// A plugin field's number; none where it is not there or has no number.
inline std::optional<double> value_of(const nvinfer1::PluginFieldCollection& given, const std::string& name) {
  for (int i = 0; i < given.nbFields; ++i) {
    const nvinfer1::PluginField& field = given.fields[i];
    if (name != field.name || !field.data) continue;
    switch (field.type) {
      case nvinfer1::PluginFieldType::kFLOAT32: return *static_cast<const float*>(field.data);
      case nvinfer1::PluginFieldType::kINT32: return *static_cast<const int32_t*>(field.data);
#if QPASS_TENSORRT >= 10
      case nvinfer1::PluginFieldType::kINT64: return double(*static_cast<const int64_t*>(field.data));
#endif
      default: return std::nullopt;
    }
  }
  return std::nullopt;
}

// A node of an op by a plugin's fields; none, and reported, where one is missing.
inline std::optional<Node> node_of(const Op& op, const nvinfer1::PluginFieldCollection& given) {
  std::vector<double> values;
  for (const Field& field : op.fields) {
    std::optional<double> value = value_of(given, field.name);
    if (!value) {
      report(std::string(op.name) + ": its attribute " + field.name + " is missing, or is no number");
      return std::nullopt;
    }
    values.push_back(*value);
  }
  if (std::max(op.inputs.size(), op.outputs.size()) > kMostTensors) {
    report(std::string(op.name) + " has more inputs or outputs than " + std::to_string(kMostTensors));
    return std::nullopt;
  }
  return Node(op, values);
}

// What a creator tells of its op, in either interface. `more`: integers that its plugins are told beyond the op's attributes.
template <typename Interface>
class CreatorOf : public Interface {
 public:
  explicit CreatorOf(const Op& op, const std::vector<const char*>& more = {}) : op_(op) {
    for (const Field& f : op.fields) fields_.push_back({f.name, nullptr, type_of(f), 1});
    for (const char* name : more) fields_.push_back({name, nullptr, nvinfer1::PluginFieldType::kINT32, 1});
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  char const* getPluginName() const noexcept override { return op_.name; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

 protected:
  const Op& op_;

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// A creator for every op, as TensorRT asks a library for them; it keeps them for good.
template <typename Creator, typename Interface>
Interface* const* creators_of_all(int32_t& count) {
  static const auto creators = [] {
    std::vector<Interface*> all;
    for (const Op* op : ops()) all.push_back(new Creator(*op));
    return all;
  }();
  count = int32_t(creators.size());
  return creators.data();
}

}  // namespace qpass

#define QPASS_EXPORT extern "C" __attribute__((visibility("default")))
