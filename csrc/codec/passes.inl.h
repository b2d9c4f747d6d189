// Ranges and signs: plain passes, left to the compiler.
#pragma once

#include "codec/bits.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

template <class T>
void range(const uint8_t* s, size_t n, int* least, int* greatest) {
  constexpr size_t kBlock = 1024;
  T low = static_cast<T>(*least), high = static_cast<T>(*greatest);
  T block[kBlock];
  for (size_t i = 0; i < n; i += kBlock) {
    const size_t r = n - i < kBlock ? n - i : kBlock;
    std::memcpy(block, s + i * sizeof(T), r * sizeof(T));  // s may be unaligned
    for (size_t j = 0; j < r; ++j) {
      low = block[j] < low ? block[j] : low;
      high = block[j] > high ? block[j] : high;
    }
  }
  *least = low;
  *greatest = high;
}

template <class U>
void zigzag(U* v, size_t n) {
  constexpr int s = sizeof(U) * 8 - 1;
  for (size_t i = 0; i < n; ++i)
    v[i] = static_cast<U>(static_cast<U>(v[i] << 1) ^ static_cast<U>(0u - (v[i] >> s)));
}
template <class U>
void unzigzag(U* v, size_t n) {
  for (size_t i = 0; i < n; ++i) v[i] = static_cast<U>((v[i] >> 1) ^ static_cast<U>(0u - (v[i] & 1u)));
}

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
