// Internal: the memory of weights, and scratch cut into pieces.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace actzip {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Region;
struct Free {
  std::shared_ptr<Region> region;  // null: from the heap
  void operator()(float* p) const {
    if (region == nullptr) std::free(p);
  }
};
using Floats = std::unique_ptr<float[], Free>;

// Zeros, aligned to 64 bytes and readable 64 bytes further.
Floats make_floats(int64_t count);
// The same for packed weights. Those of many layers lie together in regions that may use large pages: a layer
// reads its rows at random, and all layers together far exceed what the TLB covers with small ones.
Floats make_weights(int64_t count);

// Cuts scratch memory into aligned pieces; with a null base it only adds sizes up.
struct Carver {
  unsigned char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return p;
  }
};

}  // namespace actzip
