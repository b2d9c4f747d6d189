#include <cstdlib>
#include <new>

#include "codec/codec.h"

namespace actzip::codec {

Scratch::~Scratch() {
  for (void* p : data_) ::operator delete(p, std::align_val_t{64});
}

void* Scratch::get(int slot, size_t bytes) {
  if (data_[slot] == nullptr || size_[slot] < bytes) {
    ::operator delete(data_[slot], std::align_val_t{64});
    data_[slot] = nullptr;
    size_[slot] = 0;
    const size_t n = bytes + bytes / 4;
    data_[slot] = ::operator new(n + kPad, std::align_val_t{64});
    size_[slot] = n;
  }
  return data_[slot];
}

void Scratch::trim(size_t keep) {
  for (int i = 0; i < kSlots; ++i)
    if (size_[i] > keep) {
      ::operator delete(data_[i], std::align_val_t{64});
      data_[i] = nullptr;
      size_[i] = 0;
    }
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace actzip::codec
