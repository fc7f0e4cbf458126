// Any op as an IPluginV3, the plugin interface of TensorRT 10, 11 and TensorRT-RTX.
//
// TensorRT asks `getCreators` for a creator an op, the creator for a plugin a node, and the plugin for three capabilities: core
// (who it is), build (types, shapes, workspace) and runtime (enqueue). One class answers for all of them.
#include <NvInferRuntime.h>

#include <algorithm>
#include <optional>

#include "logger.h"
#include "op.h"
#include "shapes.h"

namespace qpass {
namespace {

using namespace nvinfer1;

std::optional<qpass_type> from_tensorrt(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return QPASS_FLOAT;
    case DataType::kHALF: return QPASS_HALF;
    case DataType::kBF16: return QPASS_BFLOAT16;
    case DataType::kINT8: return QPASS_INT8;
    default: return std::nullopt;
  }
}

DataType to_tensorrt(qpass_type type) {
  switch (type) {
    case QPASS_HALF: return DataType::kHALF;
    case QPASS_BFLOAT16: return DataType::kBF16;
    case QPASS_INT8: return DataType::kINT8;
    case QPASS_FLOAT: break;
  }
  return DataType::kFLOAT;
}

Tensor tensor_of(const PluginTensorDesc& desc, const Dims& dims, const void* data) {
  Tensor t;
  t.data = const_cast<void*>(data);
  t.type = from_tensorrt(desc.type).value_or(QPASS_FLOAT);
  t.rank = dims.nbDims;
  std::copy(dims.d, dims.d + dims.nbDims, t.dims);
  return t;
}

struct Symbols {
  using Dim = const IDimensionExpr*;
  Dim constant(int64_t value) const { return builder->constant(value); }
  Dim times(Dim dim, int64_t by) const { return make(DimensionOperation::kPROD, dim, constant(by)); }
  Dim divided(Dim dim, int64_t by) const { return make(DimensionOperation::kFLOOR_DIV, dim, constant(by)); }
  bool broadcastable(Dim, Dim) const { return true; }
  // A dim that is not known now is taken for the same as the other: an expression that says "or 1" would hide the shape from
  // TensorRT, which refuses what it cannot follow. onShapeChange sees numbers, and refuses what is not so.
  Dim broadcast(Dim a, Dim b) const {
    if (a->isConstant()) return a->getConstantValue() == 1 ? b : a;
    return b->isConstant() && b->getConstantValue() != 1 ? b : a;
  }
  bool equal(Dim, Dim) const { return true; }
  Dim make(DimensionOperation op, Dim a, Dim b) const { return builder->operation(op, *a, *b); }

  IExprBuilder* builder;
};

constexpr size_t kMostTensors = 16;  // of a node, on each side

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit Plugin(const Node& node) : node_(node) {
    integers_.reserve(node_.values.size());
    floats_.reserve(node_.values.size());
    for (size_t i = 0; i < node_.values.size(); ++i) {
      const Field& field = node_.op.fields[i];
      integers_.push_back(int32_t(node_.values[i]));
      floats_.push_back(float(node_.values[i]));
      if (field.is_float) {
        fields_.push_back({field.name, &floats_.back(), PluginFieldType::kFLOAT32, 1});
      } else {
        fields_.push_back({field.name, &integers_.back(), PluginFieldType::kINT32, 1});
      }
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new Plugin(node_); }

  char const* getPluginName() const noexcept override { return node_.op.name; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return int32_t(node_.outputs.size()); }

  int32_t configurePlugin(
      DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {
    return 0;
  }

  int32_t getOutputDataTypes(
      DataType* types, int32_t outputs, DataType const* in, int32_t inputs) const noexcept override {
    if (!arity_fits(inputs, outputs)) return 1;
    qpass_type t = inputs ? from_tensorrt(in[node_.t_input()]).value_or(QPASS_FLOAT) : QPASS_FLOAT;
    for (int i = 0; i < outputs; ++i) types[i] = to_tensorrt(node_.type(*node_.outputs[i], t));
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out, int32_t outputs,
      IExprBuilder& builder) noexcept override {
    if (!arity_fits(inputs, outputs)) return 1;
    Shapes<Symbols> shapes(node_, Symbols{&builder});
    for (int i = 0; i < inputs; ++i) {
      const Slot& slot = *node_.inputs[i];
      if (!shapes.bind(slot, {in[i].d, in[i].d + in[i].nbDims})) {
        report(std::string(node_.op.name) + ": " + slot.name + " has " + std::to_string(in[i].nbDims) +
               " dims, which do not fit [" + node_.shape(slot) + "]");
        return 1;
      }
    }
    for (int i = 0; i < outputs; ++i) {
      std::vector<const IDimensionExpr*> dims;
      if (!shapes.solve(*node_.outputs[i], &dims)) {
        report(std::string(node_.op.name) + ": no input has the dims of its output " + node_.outputs[i]->name);
        return 1;
      }
      out[i].nbDims = int32_t(dims.size());
      std::copy(dims.begin(), dims.end(), out[i].d);
    }
    return 0;
  }

  bool supportsFormatCombination(
      int32_t position, DynamicPluginTensorDesc const* all, int32_t inputs, int32_t outputs) noexcept override {
    if (!arity_fits(inputs, outputs) || all[position].desc.format != TensorFormat::kLINEAR) return false;
    const Slot& slot = position < inputs ? *node_.inputs[position] : *node_.outputs[position - inputs];
    std::optional<qpass_type> type = from_tensorrt(all[position].desc.type);
    if (!type || slot.kind != Kind::kT) return type && *type == node_.type(slot, *type);
    // TensorRT asks position by position: what comes later is not settled yet
    const int first = int(node_.t_input());
    return *type != QPASS_INT8 && (position <= first || type == from_tensorrt(all[first].desc.type));
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out,
      int32_t outputs) const noexcept override {
    std::vector<Tensor> from, to;
    const void* there = reinterpret_cast<const void*>(256);  // says that the tensor is there; nobody reads it
    for (int i = 0; i < inputs; ++i) from.push_back(tensor_of(in[i].desc, in[i].max, there));
    for (int i = 0; i < outputs; ++i) to.push_back(tensor_of(out[i].desc, out[i].max, there));
    return node_.op.workspace(Call(node_, from.data(), to.data(), nullptr));
  }

  int32_t onShapeChange(
      PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out, int32_t outputs) noexcept override {
    std::vector<Tensor> from, to;
    for (int i = 0; i < inputs; ++i) from.push_back(tensor_of(in[i], in[i].dims, nullptr));
    for (int i = 0; i < outputs; ++i) to.push_back(tensor_of(out[i], out[i].dims, nullptr));
    std::string error = node_.check(from.data(), inputs, to.data(), outputs);
    if (!error.empty()) report(error);
    return !error.empty();
  }

  int32_t enqueue(PluginTensorDesc const* in_desc, PluginTensorDesc const* out_desc, void const* const* in,
      void* const* out, void* workspace, cudaStream_t stream) noexcept override {
    Tensor from[kMostTensors], to[kMostTensors];
    for (size_t i = 0; i < node_.inputs.size(); ++i) from[i] = tensor_of(in_desc[i], in_desc[i].dims, in[i]);
    for (size_t i = 0; i < node_.outputs.size(); ++i) to[i] = tensor_of(out_desc[i], out_desc[i].dims, out[i]);
    std::string error = node_.run(from, to, workspace, stream);
    if (!error.empty()) report(error);
    return !error.empty();
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  bool arity_fits(int inputs, int outputs) const noexcept {
    if (inputs == int(node_.inputs.size()) && outputs == int(node_.outputs.size())) return true;
    report(std::string(node_.op.name) + ": the node has " + std::to_string(inputs) + " inputs and " +
           std::to_string(outputs) + " outputs, but its attributes say " + std::to_string(node_.inputs.size()) + " and " +
           std::to_string(node_.outputs.size()));
    return false;
  }

  const Node node_;
  std::vector<int32_t> integers_;
  std::vector<float> floats_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

class Creator : public IPluginCreatorV3One {
 public:
  explicit Creator(const Op& op) : op_(op) {
    for (const Field& f : op.fields) {
      fields_.push_back({f.name, nullptr, f.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1});
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  IPluginV3* createPlugin(char const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    std::vector<double> values;
    for (const Field& field : op_.fields) {
      const PluginField* found = nullptr;
      for (int i = 0; i < given->nbFields; ++i) {
        if (std::string(field.name) == given->fields[i].name) found = &given->fields[i];
      }
      std::optional<double> value = found ? value_of(*found) : std::nullopt;
      if (!value) {
        report(std::string(op_.name) + ": its attribute " + field.name + (found ? " is no number" : " is missing"));
        return nullptr;
      }
      values.push_back(*value);
    }
    if (std::max(op_.inputs.size(), op_.outputs.size()) > kMostTensors) {
      report(std::string(op_.name) + " has more inputs or outputs than " + std::to_string(kMostTensors));
      return nullptr;
    }
    return new Plugin(Node(op_, values));
  }

  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return op_.name; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  static std::optional<double> value_of(const PluginField& field) {
    if (!field.data) return std::nullopt;
    switch (field.type) {
      case PluginFieldType::kFLOAT32: return *static_cast<const float*>(field.data);
      case PluginFieldType::kINT32: return *static_cast<const int32_t*>(field.data);
      case PluginFieldType::kINT64: return double(*static_cast<const int64_t*>(field.data));
      default: return std::nullopt;
    }
  }

  const Op& op_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

}  // namespace
}  // namespace qpass

#define QPASS_EXPORT extern "C" __attribute__((visibility("default")))

// The two functions that TensorRT looks for in a plugin library.
QPASS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { qpass::set_logger_finder(finder); }

QPASS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static const auto creators = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> all;
    for (const qpass::Op* op : qpass::ops()) all.push_back(new qpass::Creator(*op));  // TensorRT keeps them for good
    return all;
  }();
  count = int32_t(creators.size());
  return creators.data();
}
