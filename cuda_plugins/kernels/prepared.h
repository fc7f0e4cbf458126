// What a kernel of CUTLASS's is launched with takes several times longer to make than to launch: tensor maps come from the driver,
// by a name that is looked up each time. A model makes the same calls over and over, so it is kept.
#pragma once

#include <functional>
#include <optional>
#include <tuple>
#include <unordered_map>

#include "gemm.h"

namespace qpass {

// By everything that a launch is made of. Nothing of it depends on what the memory behind a pointer holds, or once was: the same
// product makes the same launch.
struct Product {
  Gemm g;
  int device;

  auto members() const {  // what `variant` and the types say is the kernel, of which each has a table of its own
    return std::tie(g.m, g.n, g.k, g.a, g.b, g.lda, g.ldb, g.row_scale, g.col_scale, g.per_row, g.per_column, g.bias, g.d, g.ldd,
        device);
  }
  bool operator==(const Product& other) const { return members() == other.members(); }
};

// The launches of one kernel, for one thread.
template <typename Launch>
class Prepared {
 public:
  // What `make` returned for the product, now or in an earlier call; null where that was nothing.
  template <typename Make>
  Launch* of(const Product& product, Make make) {
    auto found = launches_.find(product);
    if (found != launches_.end()) return &found->second;
    std::optional<Launch> made = make();
    if (!made) return nullptr;
    if (launches_.size() >= kMost) launches_.clear();
    return &launches_.emplace(product, *made).first->second;
  }

 private:
  static constexpr size_t kMost = 1024;  // of about 1 KiB each; a model has fewer layers, one whose tensors move about has no end
  struct Hash {
    size_t operator()(const Product& product) const {
      uint64_t hash = 0;
      auto mix = [&](uint64_t word) { hash = (hash ^ word) * 0x9e3779b97f4a7c15, hash ^= hash >> 32; };
      for (const void* p : {product.g.a, product.g.b, static_cast<const void*>(product.g.d)}) mix(reinterpret_cast<uintptr_t>(p));
      for (int64_t size : {product.g.m, product.g.n, product.g.k}) mix(uint64_t(size));
      return hash;
    }
  };
  std::unordered_map<Product, Launch, Hash> launches_;
};

}  // namespace qpass
