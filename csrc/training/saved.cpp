#include "training/saved.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/isa_table.h"
#include "training/team.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace actzip::training {

ACTZIP_ISA_TABLE(kernels_for, Kernels, kKernels)

namespace {

// What a thread needs for one chunk, in memory of its own: half of the second-level cache at most.
struct Scratch {
  alignas(64) uint64_t values[kChunk + kSlack];
  alignas(64) float floats[kChunk + kSlack];
  alignas(64) uint8_t codes[kChunk + kSlack];
  alignas(64) Range ranges[kChunk / kGroup + 1];
};

Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

// fn(chunk, first element, elements) for every chunk.
template <class F>
void each_chunk(int64_t n, int threads, F&& fn) {
  // Some chunks a call: 4 chunks are 128 KiB of floats.
  constexpr int64_t kStride = 4;
  const int64_t chunks = chunks_of(n);
  each((chunks + kStride - 1) / kStride, threads, [&](int64_t block) {
    const int64_t end = std::min(chunks, (block + 1) * kStride);
    for (int64_t c = block * kStride; c < end; ++c) fn(c, c * kChunk, std::min(kChunk, n - c * kChunk));
  });
}

int64_t sum(const int32_t* counts, int64_t chunks) {
  int64_t total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += counts[c];
  return total;
}

std::vector<int64_t> starts_of(const int32_t* counts, int64_t chunks) {
  std::vector<int64_t> starts(static_cast<size_t>(chunks));
  int64_t at = 0;
  for (int64_t c = 0; c < chunks; ++c) starts[static_cast<size_t>(c)] = at, at += counts[c];
  return starts;
}

int64_t code_bytes(int64_t n, int bits) {
  return bits == 8 ? n : (n + kCodeBlock - 1) / kCodeBlock * kCodeBlock / 2;
}
int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }

struct Place {
  int64_t count, codes, ranges;
};

std::vector<Place> places_of(const int32_t* counts, int64_t n, int bits) {
  const int64_t chunks = chunks_of(n);
  std::vector<Place> places(static_cast<size_t>(chunks));
  Place at{};
  for (int64_t c = 0; c < chunks; ++c) {
    at.count = counts != nullptr ? counts[c] : std::min(kChunk, n - c * kChunk);
    places[static_cast<size_t>(c)] = at;
    at.codes += code_bytes(at.count, bits);
    at.ranges += groups_of(at.count);
  }
  return places;
}

const char* at(const void* x, int64_t bytes) { return static_cast<const char*>(x) + bytes; }
char* at(void* x, int64_t bytes) { return static_cast<char*>(x) + bytes; }
int width_of(Real type) { return type == Real::float32 ? 4 : 2; }

}  // namespace

double sample_density(const void* x, int64_t n, int width) {
  constexpr int64_t kRuns = 32, kRun = 16;  // whole cache lines, spread
  const Kernels& k = kernels_for(active_isa());
  uint8_t bits[64];
  if (n <= kRuns * kRun) return n == 0 ? 0.0 : double(k.nonzero(x, n, width, bits)) / double(n);
  int64_t some = 0;
  for (int64_t r = 0; r < kRuns; ++r) {
    const int64_t first = (n - kRun) / (kRuns - 1) * r;
    some += k.nonzero(at(x, first * width), kRun, width, bits);
  }
  return double(some) / double(kRuns * kRun);
}

uint64_t fingerprint(const void* x, int64_t bytes) {
  constexpr int64_t kPlaces = 64;
  const int64_t words = bytes / 8, lines = (words + 7) / 8;
  const int64_t step = lines <= kPlaces ? 1 : (lines - 1) / (kPlaces - 1);
  uint64_t hash = 0x9e3779b97f4a7c15ull;
  for (int64_t line = 0; line < lines; line += step) {
    for (int64_t w = line * 8; w < std::min(words, line * 8 + 8); ++w) {
      uint64_t word;
      memcpy(&word, at(x, w * 8), 8);
      hash = (hash ^ word) * 0xd1342543de82ef95ull;
      hash ^= hash >> 29;
    }
  }
  return hash;
}

bool is_uniform(const void* x, int64_t n, int width) {
  return n == 0 || memcmp(x, at(x, width), static_cast<size_t>((n - 1) * width)) == 0;
}

int64_t nonzero_mask(const void* x, int64_t n, int width, uint8_t* bits, int32_t* counts, int threads) {
  const Kernels& k = kernels_for(active_isa());
  each_chunk(n, threads, [&](int64_t c, int64_t first, int64_t size) {
    counts[c] = static_cast<int32_t>(k.nonzero(at(x, first * width), size, width, bits + first / 8));
  });
  return sum(counts, chunks_of(n));
}

int64_t test_mask(const void* x, int64_t n, Real type, Test test, float lo, float hi, uint8_t* bits,
                  int32_t* counts, int threads) {
  const Kernels& k = kernels_for(active_isa());
  std::atomic<bool> nans{false};
  each_chunk(n, threads, [&](int64_t c, int64_t first, int64_t size) {
    const void* from = at(x, first * width_of(type));
    counts[c] = static_cast<int32_t>(k.test(from, size, type, test, lo, hi, bits + first / 8));
    if (test != Test::not_beyond) return;
    uint8_t again[kChunk / 8];
    if (k.test(from, size, type, Test::between, lo, hi, again) != counts[c]) nans = true;
  });
  return nans ? -1 : sum(counts, chunks_of(n));
}

bool compress(const void* x, int64_t n, int width, const uint8_t* bits, const int32_t* counts, void* values,
              int threads) {
  const Kernels& k = kernels_for(active_isa());
  const std::vector<int64_t> starts = starts_of(counts, chunks_of(n));
  std::atomic<bool> same{true};
  each_chunk(n, threads, [&](int64_t c, int64_t first, int64_t size) {
    Scratch& s = scratch();
    const int64_t got = k.compress(at(x, first * width), size, width, bits + first / 8, s.values);
    if (got != counts[c])
      same = false;
    else
      memcpy(at(values, starts[static_cast<size_t>(c)] * width), s.values, static_cast<size_t>(got * width));
  });
  return same;
}

void expand(const void* values, const uint8_t* bits, const int32_t* counts, int64_t n, int width, void* out,
            int threads) {
  const Kernels& k = kernels_for(active_isa());
  const std::vector<int64_t> starts = starts_of(counts, chunks_of(n));
  each_chunk(n, threads, [&](int64_t c, int64_t first, int64_t size) {
    k.expand(at(values, starts[static_cast<size_t>(c)] * width), bits + first / 8, size, width,
             at(out, first * width));
  });
}

void fill(const uint8_t* bits, int64_t n, int width, uint64_t on, uint64_t off, void* out, int threads) {
  const Kernels& k = kernels_for(active_isa());
  each_chunk(n, threads, [&](int64_t, int64_t first, int64_t size) {
    k.fill(bits + first / 8, size, width, on, off, at(out, first * width));
  });
}

void select(const void* x, const uint8_t* bits, int64_t n, int width, void* out, int threads) {
  const Kernels& k = kernels_for(active_isa());
  each_chunk(n, threads, [&](int64_t, int64_t first, int64_t size) {
    k.select(at(x, first * width), bits + first / 8, size, width, at(out, first * width));
  });
}

std::pair<int64_t, int64_t> coded_size(const int32_t* counts, int64_t chunks, int bits) {
  std::pair<int64_t, int64_t> size{};
  for (int64_t c = 0; c < chunks; ++c) {
    size.first += code_bytes(counts[c], bits);
    size.second += groups_of(counts[c]);
  }
  return size;
}

Quantized quantize(const void* x, int64_t n, Real type, const uint8_t* mask, const int32_t* counts, int bits,
                   uint64_t seed, uint8_t* codes, Range* ranges, int threads) {
  const Kernels& k = kernels_for(active_isa());
  const std::vector<Place> places = places_of(counts, n, bits);
  const int width = width_of(type);
  std::atomic<Quantized> result{Quantized::yes};
  each_chunk(n, threads, [&](int64_t c, int64_t first, int64_t size) {
    Scratch& s = scratch();
    const Place& place = places[static_cast<size_t>(c)];
    const void* from = at(x, first * width);
    if (mask != nullptr) {
      void* to = type == Real::float32 ? static_cast<void*>(s.floats) : s.values;
      if (k.compress(from, size, width, mask + first / 8, to) != place.count) {
        result = Quantized::other_zeros;
        return;
      }
      from = to;
    }
    if (type == Real::bfloat16) {
      k.widen(from, place.count, s.floats);
      from = s.floats;
    }
    const uint64_t chunk_seed = seed ^ (static_cast<uint64_t>(c) * 0xd1342543de82ef95ull);
    if (!k.quantize(static_cast<const float*>(from), place.count, bits, chunk_seed, s.codes, s.ranges)) {
      result = Quantized::not_finite;
      return;
    }
    memcpy(codes + place.codes, s.codes, static_cast<size_t>(code_bytes(place.count, bits)));
    memcpy(ranges + place.ranges, s.ranges, static_cast<size_t>(groups_of(place.count)) * sizeof(Range));
  });
  return result;
}

void dequantize(const uint8_t* codes, const Range* ranges, int64_t n, Real type, const uint8_t* mask,
                const int32_t* counts, int bits, void* out, int threads) {
  const Kernels& k = kernels_for(active_isa());
  const std::vector<Place> places = places_of(counts, n, bits);
  const int width = width_of(type);
  each_chunk(n, threads, [&](int64_t c, int64_t first, int64_t size) {
    Scratch& s = scratch();
    const Place& place = places[static_cast<size_t>(c)];
    k.dequantize(codes + place.codes, ranges + place.ranges, place.count, bits, s.floats);
    const void* values = s.floats;
    if (type == Real::bfloat16) {
      k.narrow(s.floats, place.count, s.values);
      values = s.values;
    }
    if (mask == nullptr)
      memcpy(at(out, first * width), values, static_cast<size_t>(size * width));
    else
      k.expand(values, mask + first / 8, size, width, at(out, first * width));
  });
}

int PoolShape::bits() const {
  const int64_t places = kernel_h * kernel_w;
  return places <= 2 ? 1 : places <= 4 ? 2 : places <= 16 ? 4 : places <= 256 ? 8 : 0;
}

namespace {

// fn(index of the element, first row and column of its window), for the elements of a block of outputs.
template <class F>
void each_output(const PoolShape& pool, int64_t begin, int64_t end, F&& fn) {
  int64_t inner = begin % pool.inner, rest = begin / pool.inner;
  int64_t ow = rest % pool.ow, oh = rest / pool.ow % pool.oh;
  for (int64_t i = begin; i < end; ++i) {
    fn(i, oh * pool.stride_h - pool.pad_h, ow * pool.stride_w - pool.pad_w);
    if (++inner < pool.inner) continue;
    inner = 0;
    if (++ow < pool.ow) continue;
    ow = 0;
    if (++oh == pool.oh) oh = 0;
  }
}

constexpr int64_t kIndexBlock = 1 << 15;  // outputs a call: whole bytes of codes at any width

}  // namespace

bool pack_indices(const int64_t* indices, const PoolShape& pool, uint8_t* codes, int threads) {
  const int64_t n = pool.count();
  const int bits = pool.bits();
  if (bits == 0) return false;
  std::atomic<bool> fit{true};
  each((n + kIndexBlock - 1) / kIndexBlock, threads, [&](int64_t block) {
    const int64_t begin = block * kIndexBlock, end = std::min(n, begin + kIndexBlock);
    const auto iw = static_cast<uint32_t>(pool.iw);
    bool good = true;
    memset(codes + begin * bits / 8, 0, static_cast<size_t>((end * bits + 7) / 8 - begin * bits / 8));
    each_output(pool, begin, end, [&](int64_t i, int64_t row, int64_t column) {
      const int64_t index = indices[i];
      if (index < 0 || index >= pool.ih * pool.iw) {
        good = false;
        return;
      }
      const auto y = static_cast<int64_t>(static_cast<uint32_t>(index) / iw);
      int64_t dy = y - row, dx = index - y * pool.iw - column;
      if (pool.dilation_h != 1) good &= dy % pool.dilation_h == 0, dy /= pool.dilation_h;
      if (pool.dilation_w != 1) good &= dx % pool.dilation_w == 0, dx /= pool.dilation_w;
      good &= dy >= 0 && dy < pool.kernel_h && dx >= 0 && dx < pool.kernel_w;
      const int64_t bit = i * bits;
      codes[bit / 8] |= static_cast<uint8_t>((dy * pool.kernel_w + dx) << (bit % 8));
    });
    if (!good) fit = false;
  });
  return fit;
}

void unpack_indices(const uint8_t* codes, const PoolShape& pool, int64_t* indices, int threads) {
  const int64_t n = pool.count();
  const int bits = pool.bits();
  const int low = (1 << bits) - 1;
  int64_t steps[256];  // from a window's first place to each of its places
  for (int64_t p = 0; p < pool.kernel_h * pool.kernel_w; ++p)
    steps[p] = p / pool.kernel_w * pool.dilation_h * pool.iw + p % pool.kernel_w * pool.dilation_w;
  each((n + kIndexBlock - 1) / kIndexBlock, threads, [&](int64_t block) {
    const int64_t begin = block * kIndexBlock, end = std::min(n, begin + kIndexBlock);
    each_output(pool, begin, end, [&](int64_t i, int64_t row, int64_t column) {
      const int64_t bit = i * bits;
      indices[i] = row * pool.iw + column + steps[codes[bit / 8] >> (bit % 8) & low];
    });
  });
}

void advise_large_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace actzip::training
