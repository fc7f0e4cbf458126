#include "op.h"

#include <cstring>

#include "shapes.h"

namespace qpass {
namespace {

struct Numbers {
  using Dim = int64_t;
  Dim constant(int64_t value) const { return value; }
  Dim times(Dim dim, int64_t by) const { return dim * by; }
  Dim divided(Dim dim, int64_t by) const { return dim / by; }
  Dim broadcast(Dim a, Dim b) const { return a == 1 ? b : a; }
  bool broadcastable(Dim a, Dim b) const { return a == b || a == 1 || b == 1; }
  bool equal(Dim a, Dim b) const { return a == b; }
};

std::vector<int64_t> dims_of(const Tensor& t) { return {t.dims, t.dims + t.rank}; }

const Tensor* find(const std::vector<const Slot*>& slots, const Tensor* tensors, const char* name) {
  for (size_t i = 0; i < slots.size(); ++i) {
    if (!std::strcmp(slots[i]->name, name)) return tensors + i;
  }
  return nullptr;
}

std::vector<const Slot*> present(const std::vector<Slot>& slots, const Node& node) {
  std::vector<const Slot*> there;
  for (const Slot& slot : slots) {
    const When& when = slot.when;
    if (!when.attribute || bool(int(node.value(when.attribute)) & when.mask) == when.on) there.push_back(&slot);
  }
  return there;
}

const char* name_of(qpass_type type) {
  switch (type) {
    case QPASS_FLOAT: return "float32";
    case QPASS_HALF: return "float16";
    case QPASS_BFLOAT16: return "bfloat16";
    case QPASS_INT8: return "int8";
  }
  return "?";
}

}  // namespace

int64_t Tensor::rows() const {
  int64_t product = 1;
  for (int i = 0; i + 1 < rank; ++i) product *= dims[i];
  return product;
}

std::string to_text(const Tensor& t) {
  std::string text = std::string(name_of(t.type)) + "[";
  for (int i = 0; i < t.rank; ++i) text += (i ? ", " : "") + std::to_string(t.dims[i]);
  return text + "]";
}

const Tensor* Call::in(const char* name) const { return find(node_.inputs, inputs_, name); }
const Tensor* Call::out(const char* name) const { return find(node_.outputs, outputs_, name); }
int Call::attribute(const char* name) const { return int(node_.value(name)); }
float Call::number(const char* name) const { return float(node_.value(name)); }
qpass_variant Call::variant() const { return node_.variant; }

const Op* find_op(const std::string& name) {
  for (const Op* op : ops()) {
    if (name == op->name) return op;
  }
  return nullptr;
}

Node::Node(const Op& op, std::vector<double> values) : op(op), values(std::move(values)) {
  inputs = present(op.inputs, *this);
  outputs = present(op.outputs, *this);
}

size_t Node::t_input() const {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i]->kind == Kind::kT) return i;
  }
  return 0;
}

double Node::value(const char* field) const {
  for (size_t i = 0; i < op.fields.size(); ++i) {
    if (!std::strcmp(op.fields[i].name, field)) return values[i];
  }
  return 0;
}

void Node::set(const char* field, double value) {
  for (size_t i = 0; i < op.fields.size(); ++i) {
    if (!std::strcmp(op.fields[i].name, field)) values[i] = value;
  }
}

const char* Node::shape(const Slot& slot) const {
  if (!slot.shape.attribute) return slot.shape.choices[0].second;
  int wanted = int(value(slot.shape.attribute));
  for (const auto& [is, text] : slot.shape.choices) {
    if (is == wanted) return text;
  }
  return "";  // a value that the op does not have; check() finds no rank that fits
}

qpass_type Node::type(const Slot& slot, qpass_type t) const {
  switch (slot.kind) {
    case Kind::kT: return t;
    case Kind::kInt8: return QPASS_INT8;
    case Kind::kFloat32: return QPASS_FLOAT;
    case Kind::kOutputType: return qpass_type(int(value("output_type")));
  }
  return t;
}

std::string Node::check(const Tensor* in, int n_in, const Tensor* out, int n_out) const {
  std::string who = std::string(op.name) + ": ";
  if (n_in != int(inputs.size()) || n_out != int(outputs.size())) {
    return who + std::to_string(n_in) + " inputs and " + std::to_string(n_out) + " outputs, wants " +
           std::to_string(inputs.size()) + " and " + std::to_string(outputs.size()) + " by its attributes";
  }
  qpass_type t = n_in ? in[t_input()].type : QPASS_FLOAT;
  Shapes<Numbers> shapes(*this, {});
  for (int i = 0; i < n_in; ++i) {
    const Slot& slot = *inputs[i];
    bool floating = in[i].type == QPASS_FLOAT || in[i].type == QPASS_HALF || in[i].type == QPASS_BFLOAT16;
    if (in[i].type != type(slot, t) || (slot.kind == Kind::kT && !floating)) {
      return who + slot.name + " is " + to_text(in[i]);
    }
    if (!shapes.bind(slot, dims_of(in[i]))) {
      return who + slot.name + " is " + to_text(in[i]) + ", which does not fit [" + shape(slot) + "] and the inputs before";
    }
  }
  for (int i = 0; i < n_out; ++i) {
    const Slot& slot = *outputs[i];
    std::vector<int64_t> dims;
    if (out[i].type != type(slot, t) || !shapes.solve(slot, &dims) || dims_of(out[i]) != dims) {
      return who + "its output " + slot.name + " is " + to_text(out[i]);
    }
  }
  return "";
}

std::string Node::run(const Tensor* in, const Tensor* out, void* workspace, cudaStream_t stream) const {
  int error = op.run(Call(*this, in, out, workspace), stream);
  if (!error) return "";
  std::string text = std::string(op.name) + "(";
  for (size_t i = 0; i < inputs.size(); ++i) text += (i ? ", " : "") + std::string(inputs[i]->name) + " " + to_text(in[i]);
  return text + "): " + cudaGetErrorString(cudaError_t(error)) + " (" + cudaGetErrorName(cudaError_t(error)) + ")";
}

}  // namespace qpass
