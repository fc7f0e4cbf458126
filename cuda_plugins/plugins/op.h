// An op as qpass/ops declares it in Python: its attributes, inputs and outputs with their types and shapes, and the kernel that
// runs it. No TensorRT in here: plugin_v3.cpp makes a TensorRT plugin of any op, library.cpp a C function.
// A test compares every word of these declarations with the Python ones.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../kernels/qpass_kernels.h"

namespace qpass {

constexpr const char* kNamespace = "qpass";
constexpr const char* kVersion = "1";

enum class Kind {
  kT,           // float32, float16 or bfloat16, the same for every T of a node
  kInt8,
  kFloat32,
  kOutputType,  // one of the three, by the attribute `output_type`
};

// "... K", "N K/2", "N K/group_size": the language of qpass/ops/shapes.py. With an attribute: a shape for each of its values.
struct Shape {
  Shape(const char* text) : choices{{0, text}} {}
  Shape(const char* attribute, std::vector<std::pair<int, const char*>> choices)
      : attribute(attribute), choices(std::move(choices)) {}
  const char* attribute = nullptr;
  std::vector<std::pair<int, const char*>> choices;
};

// An optional tensor is there if `mask` is set in the attribute, or with on = false is not.
struct When {
  const char* attribute = nullptr;
  int mask = 1;
  bool on = true;
};

struct Slot {
  const char* name;
  Kind kind;
  Shape shape;
  When when = {};
};

struct Field {
  const char* name;
  bool is_float = false;
};

struct Tensor {
  void* data = nullptr;
  qpass_type type = QPASS_FLOAT;
  int32_t rank = 0;
  int64_t dims[8] = {};

  int64_t rows() const;  // the product of all dims but the last
  int64_t last() const { return rank ? dims[rank - 1] : 1; }
};

class Node;

// The tensors of one call, by the names of the declaration.
class Call {
 public:
  Call(const Node& node, const Tensor* inputs, const Tensor* outputs, void* workspace)
      : workspace(workspace), node_(node), inputs_(inputs), outputs_(outputs) {}

  const Tensor* in(const char* name) const;   // null where it is not there
  const Tensor* out(const char* name) const;
  template <typename T>
  const T* read(const char* name) const {
    const Tensor* t = in(name);
    return t ? static_cast<const T*>(t->data) : nullptr;
  }
  template <typename T>
  T* write(const char* name) const {
    const Tensor* t = out(name);
    return t ? static_cast<T*>(t->data) : nullptr;
  }
  int attribute(const char* name) const;
  float number(const char* name) const;
  qpass_variant variant() const;

  void* const workspace;

 private:
  const Node& node_;
  const Tensor* inputs_;
  const Tensor* outputs_;
};

class Op {
 public:
  Op(const char* name, std::vector<Field> fields, std::vector<Slot> inputs, std::vector<Slot> outputs)
      : name(name), fields(std::move(fields)), inputs(std::move(inputs)), outputs(std::move(outputs)) {}
  virtual ~Op() = default;

  // Bytes for any call whose leading dims are at most these. Pointers say which tensors are there, and are not read.
  virtual size_t workspace(const Call&) const { return 0; }
  virtual int run(const Call& call, cudaStream_t stream) const = 0;  // 0 or a cudaError_t
  // The variants that a call can take, none where an op goes one way only. Pointers are not read. 0 or a cudaError_t.
  virtual int choice(const Call&, qpass_choice* choice) const { return *choice = {}, 0; }

  const char* const name;
  const std::vector<Field> fields;
  const std::vector<Slot> inputs, outputs;
};

const std::vector<const Op*>& ops();  // qpass's own, then those that were registered
const Op* find_op(const std::string& name);

// For ops that are compiled in from elsewhere: `static const Register mine(op);`
struct Register {
  explicit Register(const Op& op);
};

// An op with the values of its attributes: what one node of a model is.
class Node {
 public:
  Node(const Op& op, std::vector<double> values);  // of the fields, in their order

  const Op& op;
  std::vector<double> values;
  qpass_variant variant = QPASS_AUTO;
  std::vector<const Slot*> inputs, outputs;  // those that are there

  size_t t_input() const;  // the first input of kind T, whose type T is; 0 where there is none
  double value(const char* field) const;
  void set(const char* field, double value);
  const char* shape(const Slot& slot) const;
  qpass_type type(const Slot& slot, qpass_type t) const;

  // "" or what is wrong with the types and shapes of a call.
  std::string check(const Tensor* in, int n_in, const Tensor* out, int n_out) const;
  // "" or what went wrong, with the op and its shapes.
  std::string run(const Tensor* in, const Tensor* out, void* workspace, cudaStream_t stream) const;
};

std::string to_text(const Tensor& t);  // such as float16[2, 3, 64]

}  // namespace qpass
