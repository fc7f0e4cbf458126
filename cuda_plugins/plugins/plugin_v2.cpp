// Any op as an IPluginV2DynamicExt, the plugin interface of TensorRT 8.6.
//
// That TensorRT types a network weakly: it chooses float32 or float16 for a tensor by what is faster, whatever the model says.
// Asked to choose for plugins too, it times everything around them in all combinations, for minutes, and what it takes is chance;
// so a field of the node says which of the two its floats are. It has no int8 constants; packed weights come as vectors of int32
// with the same bytes, and another field says what dims they have as int8.
#include "shell.h"

#if QPASS_TENSORRT < 10

#include <cstring>

namespace qpass {
namespace {

using namespace nvinfer1;

constexpr const char* kDims = "int8_dims";        // of each input its rank and dims; rank 0: it comes as it is
constexpr const char* kFloatType = "float_type";  // of T and output_type: a qpass_type, or 0 for any
constexpr int kMostDims = 3;                      // of packed weights

struct Build {  // what a node is told beyond its attributes
  int32_t float_type;
  int32_t rank[kMostTensors];
  int32_t dims[kMostTensors][kMostDims];
};

// None, and reported, where the dims are not a list of ranks with that many dims each.
std::optional<Build> build_of(const Op& op, const PluginFieldCollection& given) {
  Build build = {};
  build.float_type = int32_t(value_of(given, kFloatType).value_or(0));
  for (int i = 0; i < given.nbFields; ++i) {
    const PluginField& field = given.fields[i];
    if (std::string(kDims) != field.name || field.type != PluginFieldType::kINT32) continue;
    const int32_t *at = static_cast<const int32_t*>(field.data), *end = at + field.length;
    for (size_t input = 0; at < end; ++input) {
      const int32_t rank = *at++;
      if (input >= kMostTensors || rank < 0 || rank > kMostDims || rank > end - at) {
        report(std::string(op.name) + ": its " + kDims + " is no list of ranks and dims");
        return std::nullopt;
      }
      build.rank[input] = rank;
      std::copy(at, at + rank, build.dims[input]);
      at += rank;
    }
  }
  return build;
}

class Plugin : public IPluginV2DynamicExt {
 public:
  Plugin(const Node& node, const Build& build) : node_(node), build_(build) {}

  char const* getPluginType() const noexcept override { return node_.op.name; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(char const*) noexcept override {}  // it is ours, whoever asks
  int32_t getNbOutputs() const noexcept override { return int32_t(node_.outputs.size()); }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  IPluginV2DynamicExt* clone() const noexcept override { return new Plugin(node_, build_); }

  DataType getOutputDataType(int32_t index, DataType const* in, int32_t inputs) const noexcept override {
    qpass_type t = inputs ? from_tensorrt(in[node_.t_input()]).value_or(QPASS_FLOAT) : QPASS_FLOAT;
    return to_tensorrt(node_.type(*node_.outputs[index], t));
  }

  DimsExprs getOutputDimensions(int32_t index, DimsExprs const* in, int32_t inputs, IExprBuilder& builder) noexcept override {
    DimsExprs none;
    none.nbDims = -1;
    if (!arity_fits(node_, inputs, getNbOutputs())) return none;
    std::vector<std::vector<Symbols::Dim>> dims;
    for (int i = 0; i < inputs; ++i) {
      dims.emplace_back(in[i].d, in[i].d + in[i].nbDims);
      if (!is_view(i)) continue;
      dims[i].clear();
      for (int d = 0; d < build_.rank[i]; ++d) dims[i].push_back(builder.constant(build_.dims[i][d]));
    }
    std::vector<DimsExprs> solved;
    return solve_outputs(node_, dims, builder, &solved) ? solved[index] : none;
  }

  bool supportsFormatCombination(
      int32_t position, PluginTensorDesc const* all, int32_t inputs, int32_t outputs) noexcept override {
    if (!arity_fits(node_, inputs, outputs) || all[position].format != TensorFormat::kLINEAR) return false;
    if (position < inputs && is_view(position)) return all[position].type == DataType::kINT32;
    const Slot& slot = position < inputs ? *node_.inputs[position] : *node_.outputs[position - inputs];
    std::optional<qpass_type> type = from_tensorrt(all[position].type);
    if (!type || (slot.kind != Kind::kT && slot.kind != Kind::kOutputType)) return type && *type == node_.type(slot, *type);
    const int like = first_of(slot.kind);  // what comes later is not settled yet
    const bool allowed = build_.float_type ? *type == build_.float_type : *type != QPASS_INT8;
    return allowed && (position <= like || type == from_tensorrt(all[like].type));
  }

  void configurePlugin(
      DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override {
    for (int i = 0; i < outputs; ++i) adopt(*node_.outputs[i], out[i].desc.type);
  }

  size_t getWorkspaceSize(
      PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out, int32_t outputs) const noexcept override {
    Tensor from[kMostTensors], to[kMostTensors];
    for (int i = 0; i < inputs; ++i) from[i] = input(i, in[i], somewhere());
    for (int i = 0; i < outputs; ++i) to[i] = tensor_of(out[i], out[i].dims, somewhere());
    return node_.op.workspace(Call(node_, from, to, nullptr));
  }

  int32_t enqueue(PluginTensorDesc const* in_desc, PluginTensorDesc const* out_desc, void const* const* in, void* const* out,
      void* workspace, cudaStream_t stream) noexcept override {
    Tensor from[kMostTensors], to[kMostTensors];
    for (size_t i = 0; i < node_.inputs.size(); ++i) from[i] = input(i, in_desc[i], in[i]);
    for (size_t i = 0; i < node_.outputs.size(); ++i) {
      to[i] = tensor_of(out_desc[i], out_desc[i].dims, out[i]);
      adopt(*node_.outputs[i], out_desc[i].type);
    }
    std::string error = is_new(from) ? node_.check(from, int(node_.inputs.size()), to, int(node_.outputs.size())) : "";
    if (error.empty()) error = node_.run(from, to, workspace, stream);
    if (!error.empty()) report(error);
    return !error.empty();
  }

  size_t getSerializationSize() const noexcept override { return node_.values.size() * sizeof(double) + sizeof(build_); }
  void serialize(void* buffer) const noexcept override {
    size_t size = node_.values.size() * sizeof(double);
    std::memcpy(buffer, node_.values.data(), size);
    std::memcpy(static_cast<char*>(buffer) + size, &build_, sizeof(build_));
  }

 private:
  bool is_view(size_t input) const { return build_.rank[input] > 0; }

  // The first tensor of a kind, inputs before outputs: the others of this kind have its type.
  int first_of(Kind kind) const {
    int position = 0;
    for (const std::vector<const Slot*>* side : {&node_.inputs, &node_.outputs}) {
      for (const Slot* slot : *side) {
        if (slot->kind == kind) return position;
        ++position;
      }
    }
    return position;
  }

  Tensor input(size_t i, const PluginTensorDesc& desc, const void* data) const {
    Tensor t = tensor_of(desc, desc.dims, data);
    if (is_view(i)) {
      t.type = QPASS_INT8;
      t.rank = build_.rank[i];
      std::copy(build_.dims[i], build_.dims[i] + t.rank, t.dims);
    }
    return t;
  }

  void adopt(const Slot& slot, DataType type) {
    std::optional<qpass_type> chosen = from_tensorrt(type);
    if (slot.kind == Kind::kOutputType && chosen && *chosen != QPASS_INT8) node_.set("output_type", *chosen);
  }

  // Whether the inputs' shapes are others than in the last call: this interface does not tell.
  bool is_new(const Tensor* from) {
    bool changed = last_.empty();
    last_.resize(node_.inputs.size());
    for (size_t i = 0; i < last_.size(); ++i) {
      changed |= last_[i].rank != from[i].rank || std::memcmp(last_[i].dims, from[i].dims, sizeof(last_[i].dims));
      last_[i] = from[i];
    }
    return changed;
  }

  Node node_;
  const Build build_;
  std::vector<Tensor> last_;
};

class Creator : public CreatorOf<IPluginCreator> {
 public:
  explicit Creator(const Op& op) : CreatorOf(op, {kDims, kFloatType}) {}

  void setPluginNamespace(char const*) noexcept override {}

  Plugin* createPlugin(char const*, PluginFieldCollection const* given) noexcept override {
    std::optional<Node> node = node_of(op_, *given);
    std::optional<Build> build = build_of(op_, *given);
    return node && build ? new Plugin(*node, *build) : nullptr;
  }

  Plugin* deserializePlugin(char const*, void const* data, size_t size) noexcept override {
    const size_t values = op_.fields.size() * sizeof(double);
    Build build;
    if (size != values + sizeof(build)) {
      report(std::string(op_.name) + ": the engine is of other plugins than these; build it again");
      return nullptr;
    }
    std::vector<double> read(op_.fields.size());
    std::memcpy(read.data(), data, values);
    std::memcpy(&build, static_cast<const char*>(data) + values, sizeof(build));
    return new Plugin(Node(op_, read), build);
  }
};

}  // namespace
}  // namespace qpass

QPASS_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  return qpass::creators_of_all<qpass::Creator, nvinfer1::IPluginCreator>(count);
}

#endif  // QPASS_TENSORRT < 10
