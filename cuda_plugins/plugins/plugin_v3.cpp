// Any op as an IPluginV3, the plugin interface of TensorRT 10, 11 and TensorRT-RTX.
//
// TensorRT asks `getCreators` for a creator an op, the creator for a plugin a node, and the plugin for three capabilities: core
// (who it is), build (types, shapes, workspace) and runtime (enqueue). One class answers for all of them.
#include "shell.h"

#if QPASS_TENSORRT >= 10

namespace qpass {
namespace {

using namespace nvinfer1;

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit Plugin(const Node& node) : node_(node) {
    integers_.reserve(node_.values.size());
    floats_.reserve(node_.values.size());
    for (size_t i = 0; i < node_.values.size(); ++i) {
      const Field& field = node_.op.fields[i];
      integers_.push_back(int32_t(node_.values[i]));
      floats_.push_back(float(node_.values[i]));
      const void* value = field.is_float ? static_cast<const void*>(&floats_.back()) : &integers_.back();
      fields_.push_back({field.name, value, type_of(field), 1});
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
    if (!arity_fits(node_, inputs, outputs)) return 1;
    qpass_type t = inputs ? from_tensorrt(in[node_.t_input()]).value_or(QPASS_FLOAT) : QPASS_FLOAT;
    for (int i = 0; i < outputs; ++i) types[i] = to_tensorrt(node_.type(*node_.outputs[i], t));
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out, int32_t outputs,
      IExprBuilder& builder) noexcept override {
    if (!arity_fits(node_, inputs, outputs)) return 1;
    std::vector<std::vector<Symbols::Dim>> dims;
    for (int i = 0; i < inputs; ++i) dims.emplace_back(in[i].d, in[i].d + in[i].nbDims);
    std::vector<DimsExprs> solved;
    if (!solve_outputs(node_, dims, builder, &solved)) return 1;
    std::copy(solved.begin(), solved.end(), out);
    return 0;
  }

  bool supportsFormatCombination(
      int32_t position, DynamicPluginTensorDesc const* all, int32_t inputs, int32_t outputs) noexcept override {
    if (!arity_fits(node_, inputs, outputs) || all[position].desc.format != TensorFormat::kLINEAR) return false;
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
    for (int i = 0; i < inputs; ++i) from.push_back(tensor_of(in[i].desc, in[i].max, somewhere()));
    for (int i = 0; i < outputs; ++i) to.push_back(tensor_of(out[i].desc, out[i].max, somewhere()));
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
  const Node node_;
  std::vector<int32_t> integers_;
  std::vector<float> floats_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

class Creator : public CreatorOf<IPluginCreatorV3One> {
 public:
  using CreatorOf::CreatorOf;

  IPluginV3* createPlugin(char const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    std::optional<Node> node = node_of(op_, *given);
    return node ? new Plugin(*node) : nullptr;
  }
};

}  // namespace
}  // namespace qpass

QPASS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return qpass::creators_of_all<qpass::Creator, nvinfer1::IPluginCreatorInterface>(count);
}

#endif  // QPASS_TENSORRT >= 10
