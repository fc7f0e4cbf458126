// The library as seen without TensorRT: what is in it, and any op to be run, for `qpass plugins`, tests and benchmarks.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "../kernels/tuning.h"
#include "op.h"

#define QPASS_EXPORT extern "C" __attribute__((visibility("default")))

namespace qpass {
namespace {

constexpr const char* kInterface = QPASS_TENSORRT < 10 ? "IPluginV2DynamicExt" : "IPluginV3";
constexpr const char* kTypes = QPASS_TENSORRT < 10 ? "[\"float32\", \"float16\"]" : "[\"float32\", \"float16\", \"bfloat16\"]";

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

std::string json(const Shape& shape) {
  if (!shape.attribute) return quoted(shape.choices[0].second);
  std::string text = "{\"attribute\": " + quoted(shape.attribute) + ", \"shapes\": {";
  for (size_t i = 0; i < shape.choices.size(); ++i) {
    const auto& [value, declared] = shape.choices[i];
    text += (i ? ", " : "") + quoted(std::to_string(value)) + ": " + quoted(declared);
  }
  return text + "}}";
}

std::string json(const Slot& slot) {
  static const char* const kinds[] = {"T", "int8", "float32", "output_type"};
  std::string when = "null";
  if (slot.when.attribute) {
    when = "{\"attribute\": " + quoted(slot.when.attribute) + ", \"mask\": " + std::to_string(slot.when.mask) +
           ", \"on\": " + (slot.when.on ? "true" : "false") + "}";
  }
  return "{\"name\": " + quoted(slot.name) + ", \"kind\": " + quoted(kinds[int(slot.kind)]) + ", \"shape\": " +
         json(slot.shape) + ", \"when\": " + when + "}";
}

std::string json(const Field& field) {
  return "{\"name\": " + quoted(field.name) + ", \"type\": " + quoted(field.is_float ? "float" : "int") + "}";
}

template <typename T>
std::string list(const std::vector<T>& items) {
  std::string text = "[";
  for (size_t i = 0; i < items.size(); ++i) text += (i ? ", " : "") + json(items[i]);
  return text + "]";
}

std::string description() {
  std::string text = "{\"version\": " + quoted(kVersion) + ", \"namespace\": " + quoted(kNamespace) +
                     ", \"architectures\": " + quoted(QPASS_ARCHITECTURES) + ", \"interface\": " + quoted(kInterface) +
                     ", \"cuda\": " + std::to_string(CUDART_VERSION) +
                     ", \"types\": " + kTypes + ", \"kinds\": [";
  for (int i = 0; i < kProductKinds; ++i) text += (i ? ", " : "") + quoted(name_of(ProductKind(i)));
  text += "], \"variants\": [";
  for (int i = 0; i < QPASS_VARIANTS; ++i) text += (i ? ", " : "") + quoted(qpass_variant_name(qpass_variant(i)));
  text += "], \"ops\": [";
  for (const Op* op : ops()) {
    text += (op == ops()[0] ? "" : ", ") + std::string("{\"name\": ") + quoted(op->name) + ", \"fields\": " +
            list(op->fields) + ", \"inputs\": " + list(op->inputs) + ", \"outputs\": " + list(op->outputs) + "}";
  }
  return text + "]}";
}

int told(const std::string& error, char* text, size_t size) {
  if (error.empty()) return 0;
  std::strncpy(text, error.c_str(), size - 1);
  text[size - 1] = 0;
  return 1;
}

// What a call takes, of `count` in a row: the median of batches of ten, as whatever else the CPU does falls into some of them.
template <typename F>
double us_of(int count, F call) {
  using Clock = std::chrono::steady_clock;
  constexpr int kBatch = 10;
  std::vector<double> batches;
  for (int done = 0; done < count; done += kBatch) {
    const int size = std::min(kBatch, count - done);
    const auto begin = Clock::now();
    for (int i = 0; i < size; ++i) call();
    batches.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / size);
  }
  std::nth_element(batches.begin(), batches.begin() + batches.size() / 2, batches.end());
  return batches[batches.size() / 2];
}

}  // namespace
}  // namespace qpass

// What the library holds, as JSON: architectures and ops with fields, inputs and outputs.
QPASS_EXPORT const char* qpass_describe() {
  static const std::string text = qpass::description();
  return text.c_str();
}

// One node: the op, and the values of its fields in their order.
QPASS_EXPORT void* qpass_node_create(const char* op, const double* values, int count, char* error, size_t size) {
  const qpass::Op* found = qpass::find_op(op);
  if (!found || int(found->fields.size()) != count) {
    qpass::told(found ? std::string(op) + ": wrong number of fields" : std::string("no op ") + op, error, size);
    return nullptr;
  }
  return new qpass::Node(*found, {values, values + count});
}

QPASS_EXPORT void qpass_node_destroy(void* node) { delete static_cast<qpass::Node*>(node); }

QPASS_EXPORT size_t qpass_node_workspace(const void* node, const qpass::Tensor* in, const qpass::Tensor* out) {
  const qpass::Node& n = *static_cast<const qpass::Node*>(node);
  return n.op.workspace(qpass::Call(n, in, out, nullptr));
}

// Checks types and shapes, then tells the variants that the call can take on the current device. 0, or 1 with a text in `error`.
QPASS_EXPORT int qpass_node_choice(const void* node, const qpass::Tensor* in, int n_in, const qpass::Tensor* out, int n_out,
    qpass_choice* choice, char* error, size_t size) {
  const qpass::Node& n = *static_cast<const qpass::Node*>(node);
  std::string wrong = n.check(in, n_in, out, n_out);
  if (wrong.empty()) {
    int code = n.op.choice(qpass::Call(n, in, out, nullptr), choice);
    if (code) wrong = std::string(n.op.name) + ": " + cudaGetErrorString(cudaError_t(code));
  }
  return qpass::told(wrong, error, size);
}

// From now on by this variant, by its number; a call that cannot take it fails.
QPASS_EXPORT void qpass_node_set_variant(void* node, int variant) {
  static_cast<qpass::Node*>(node)->variant = qpass_variant(variant);
}

// The number of the variant that the library's table has for a kind of product on a GPU, by their names; of "rule" where it has
// none, -1 for a kind that there is not.
QPASS_EXPORT int qpass_tuned(const char* device, const char* kind, int64_t n, int64_t k, int64_t m) {
  qpass::ProductKind found = qpass::kind_of(std::string(kind));
  return found == qpass::kProductKinds ? -1 : qpass::tuning_of(device).find(found, n, k, m);
}

// Checks types and shapes, then enqueues. 0, or 1 with a text in `error`.
QPASS_EXPORT int qpass_node_run(const void* node, const qpass::Tensor* in, int n_in, const qpass::Tensor* out, int n_out,
    void* workspace, cudaStream_t stream, char* error, size_t size) {
  const qpass::Node& n = *static_cast<const qpass::Node*>(node);
  std::string wrong = n.check(in, n_in, out, n_out);
  return qpass::told(wrong.empty() ? n.run(in, out, workspace, stream) : wrong, error, size);
}

// Checks types and shapes, then enqueues `count` times, 1 or more; `us` is what a call took of the CPU. 0, or 1 with a text in `error`.
QPASS_EXPORT int qpass_node_host_us(const void* node, const qpass::Tensor* in, int n_in, const qpass::Tensor* out, int n_out,
    void* workspace, cudaStream_t stream, int count, double* us, char* error, size_t size) {
  const qpass::Node& n = *static_cast<const qpass::Node*>(node);
  std::string wrong = n.check(in, n_in, out, n_out);
  *us = qpass::us_of(count, [&] {
    if (wrong.empty()) wrong = n.run(in, out, workspace, stream);
  });
  return qpass::told(wrong, error, size);
}

// Of a launch of a kernel that does nothing, what it takes of the CPU, µs, as of `count` calls. 0, or a cudaError_t.
QPASS_EXPORT int qpass_launch_us(cudaStream_t stream, int count, double* us) {
  int error = qpass_launch_nothing(stream);  // the first one loads what is launched
  *us = qpass::us_of(count, [&] {
    if (!error) error = qpass_launch_nothing(stream);
  });
  return error;
}
