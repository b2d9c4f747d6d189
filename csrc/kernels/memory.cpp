#include "kernels/memory.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace actzip {

struct Region {
  unsigned char* base = nullptr;
  size_t size = 0, used = 0, mapped = 0;
  void* memory = nullptr;
#if defined(__linux__)
  explicit Region(size_t bytes) {
    constexpr size_t kPage = size_t{2} << 20, kRegion = size_t{32} << 20;
    size = std::max(kRegion, (bytes + kPage - 1) / kPage * kPage);
    mapped = size + kPage;
    memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory) + kPage - 1) &
                                            ~static_cast<uintptr_t>(kPage - 1));
    madvise(base, size, MADV_HUGEPAGE);
  }
  ~Region() { munmap(memory, mapped); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
#endif
};

Floats make_floats(int64_t count) {
  const auto bytes = static_cast<size_t>(round_up(count * 4 + 64, 64));
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return Floats(p);
}

Floats make_weights(int64_t count) {
#if defined(__linux__)
  const auto bytes = static_cast<size_t>(round_up(count * 4 + 64, 64));
  if (bytes < (size_t{16} << 10)) return make_floats(count);
  static std::mutex mutex;
  static std::weak_ptr<Region> current;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Region> r = current.lock();
  if (r == nullptr || r->used + bytes > r->size) {
    r = std::make_shared<Region>(bytes);
    current = r;
  }
  auto* p = reinterpret_cast<float*>(r->base + r->used);
  r->used += bytes;
  return Floats(p, Free{r});
#else
  return make_floats(count);
#endif
}

}  // namespace actzip
