// The table of tile choices: which variant of a matrix product was measured to be the fastest, by shape and number of tokens.
// What no line of it speaks of goes by the rule.
//
// As text, `#` beginning a comment:
//
//   qpass tuning 1
//   device NVIDIA H200
//   w8a8 8192 8192 64 skinny           kind, N, K, M, variant: for the tokens up to M that no smaller M of the shape takes
//   w8a8 8192 8192 1024 sm90_128x128   "rule" leaves such tokens to the rule, as it has those beyond the largest M
#pragma once

#include <map>
#include <string>
#include <vector>

#include "qpass_kernels.h"

namespace qpass {

// Products that are alike but for their shape: the ops with the types of operands, and for weights alone the size of groups.
enum ProductKind : int32_t {
  kW8A8,
  kW8A8Float,  // with a float result, for which there are fewer kernels
  kW8A16,      // and with groups of 32, 64, 128
  kW4A16 = kW8A16 + 4,
  kProductKinds = kW4A16 + 4,
};
ProductKind kind_of(const qpass_smooth_quant_gemm_args& args);
ProductKind kind_of(const qpass_weight_only_matmul_args& args);
const char* name_of(ProductKind kind);
ProductKind kind_of(const std::string& name);  // kProductKinds: there is none of this name

// The table of one GPU.
class Tuning {
 public:
  qpass_variant find(ProductKind kind, int64_t n, int64_t k, int64_t m) const;

 private:
  friend class Tunings;
  struct Entry {
    ProductKind kind;
    int64_t n, k, m;
    qpass_variant variant;
    bool operator<(const Entry& other) const;  // by all but the variant
    bool same_shape(const Entry& other) const { return kind == other.kind && n == other.n && k == other.k; }
  };
  std::vector<Entry> entries_;  // sorted
};

// The tables of several, by their names.
class Tunings {
 public:
  // Adds what a text holds, in place of what was there of the same shapes. "" or what is wrong with it: then nothing is added.
  std::string add(const std::string& text);
  const Tuning& of(const std::string& device) const;

 private:
  std::map<std::string, Tuning> by_device_;
};

// The library's own: what was compiled in, and over it the file that lies beside the library under its name with ".tuning"
// behind. Read once, at first use; a file that is malformed is reported, and does not count.
const Tuning& tuning_of(const std::string& device);

// The variant for a product on the current device.
qpass_variant tuned(ProductKind kind, int64_t n, int64_t k, int64_t m);

// Runs an op by the variant that its arguments or else the table ask for. A table may speak of a kernel that is not there: then,
// by the rule.
template <typename Args, typename Run>
int by_variant(Args args, Run run) {
  const bool choosing = args.variant == QPASS_AUTO;
  if (choosing) args.variant = tuned(kind_of(args), args.n, args.k, args.m);
  int error = run(args);
  if (!choosing || error != cudaErrorNotSupported) return error;
  args.variant = QPASS_RULE;
  return run(args);
}

}  // namespace qpass
