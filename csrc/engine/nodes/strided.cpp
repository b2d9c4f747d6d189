#include "engine/nodes/strided.h"

#include <cstring>

namespace actzip::engine {

Loops arranged(Loops loops) {
  loops.erase(std::remove_if(loops.begin(), loops.end(), [](const Loop& l) { return l.size == 1; }),
              loops.end());
  std::stable_sort(loops.begin(), loops.end(), [](const Loop& x, const Loop& y) { return x.out > y.out; });
  Loops merged;
  for (const Loop& l : loops) {
    if (!merged.empty()) {
      Loop& m = merged.back();
      if (m.out == l.out * l.size && m.a == l.a * l.size && m.b == l.b * l.size) {
        m = {m.size * l.size, l.out, l.a, l.b};
        continue;
      }
    }
    merged.push_back(l);
  }
  if (merged.empty()) merged.push_back({1, 1, 1, 1});
  return merged;
}

int64_t product(const Loops& loops, size_t first, size_t last) {
  int64_t n = 1;
  for (size_t i = first; i < last; ++i) n *= loops[i].size;
  return n;
}

namespace {

// The last loop is contiguous in the output, loop `i` in the source. Cut into pieces of the source's
// contiguous dimension, so that threads have something to share.
void transpose(const Rows& rows, Loops loops, size_t i, const float* src, float* dst, int threads) {
  const Loop last = loops.back(), cols = loops[i];
  // columns whose lines lie in the same few sets of the first cache: as many as a set has room for
  const int64_t piece = cols.out * static_cast<int64_t>(sizeof(float)) % 1024 == 0 ? 8 : 64;
  loops.erase(loops.begin() + static_cast<std::ptrdiff_t>(i));
  const int64_t pieces = (cols.size + piece - 1) / piece;
  loops.insert(loops.begin(), Loop{pieces, cols.out * piece, piece, 0});
  const size_t outer = loops.size() - 1;
  const int64_t each = product(loops, 1, outer);  // places of a piece
  const int64_t total = pieces * each, chunk = std::max<int64_t>(1, 4096 / (last.size * piece));
  parallel_for((total + chunk - 1) / chunk, threads, [&](int64_t block, int) {
    int64_t at = block * chunk;
    const int64_t end = std::min(total, at + chunk);
    for (Places places(loops, outer, at); at < end; ++at, ++places) {
      const int64_t width = std::min(piece, cols.size - at / each * piece);
      rows.transpose(src + (*places).a, last.a, dst + (*places).out, cols.out, last.size, width);
    }
  });
}

// Runs of N numbers, which are moved by an instruction or two.
template <int64_t N>
void copy_runs(const Loops& loops, const float* src, float* dst, int threads) {
  over(loops, threads, [&](const Place& p) { std::memcpy(dst + p.out, src + p.a, N * sizeof(float)); });
}

}  // namespace

void copy_strided(const Rows& rows, Loops loops, const float* src, float* dst, int threads) {
  for (const Loop& l : loops)
    if (l.size == 0) return;
  loops = arranged(std::move(loops));
  const Loop last = loops.back();
  if (last.out == 1 && last.a == 1 && last.size == 2) return copy_runs<2>(loops, src, dst, threads);
  if (last.out == 1 && last.a == 1 && last.size == 4) return copy_runs<4>(loops, src, dst, threads);
  if (last.out == 1 && last.a == 1 && last.size == 8) return copy_runs<8>(loops, src, dst, threads);
  if (last.out == 1 && last.a == 1 && last.size == 16) return copy_runs<16>(loops, src, dst, threads);
  if (last.out == 1 && last.a == 1)
    return over(loops, threads, [&](const Place& p) {
      std::memcpy(dst + p.out, src + p.a, static_cast<size_t>(last.size) * sizeof(float));
    });
  for (size_t i = 0; i + 1 < loops.size() && last.out == 1 && last.a != 0; ++i)
    if (loops[i].a == 1) return transpose(rows, std::move(loops), i, src, dst, threads);
  over(loops, threads, [&](const Place& p) {
    for (int64_t k = 0; k < last.size; ++k) dst[p.out + k * last.out] = src[p.a + k * last.a];
  });
}

void fill(const Rows& rows, const View& y, float number, int threads) {
  Loops loops;
  for (size_t d = 0; d < static_cast<size_t>(y.rank); ++d) loops.push_back({y.dims[d], y.strides[d], 0, 0});
  copy_strided(rows, std::move(loops), &number, y.data, threads);
}

}  // namespace actzip::engine
