#include "kernels/packed.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "common/thread_pool.h"
#include "kernels/kernels.h"

namespace actzip {

using kernels::Kernels;
using kernels::kernels_for;

std::vector<ChannelBlock> split_channels(int64_t channels) {
  return split_channels(std::vector<int64_t>{channels});
}

std::vector<ChannelBlock> split_channels(const std::vector<int64_t>& parts) {
  std::vector<ChannelBlock> v;
  int32_t first = 0;
  for (int64_t part : parts)
    for (int64_t left = part; left > 0; left -= 64) {
      const auto width = static_cast<int32_t>(left < 64 ? left : 64);
      v.push_back({first, width});
      first += width;
    }
  return v;
}

namespace {
// What an empty segment points to: readable for wide loads.
alignas(64) const unsigned char kNothing[kPackedSlack] = {};
size_t round64(size_t x) { return (x + 63) / 64 * 64; }
}  // namespace

size_t PackedLayout::index_bytes() const {
  const auto segments = static_cast<size_t>(n * h) * blocks.size();
  return round64(segments * static_cast<size_t>(w) * 8) + round64(segments * sizeof(void*));
}

size_t PackedLayout::value_bytes(double density) const {
  return round64(
      static_cast<size_t>(static_cast<double>(elements()) * density * static_cast<double>(value_size(type))) +
      kPackedSlack);
}

PackedMap::PackedMap(PackedLayout layout) : layout_(std::move(layout)) {
  int32_t next = 0;
  for (const ChannelBlock& b : layout_.blocks) {
    if (b.first != next || b.width < 1 || b.width > 64)
      throw std::invalid_argument("packed map: blocks must follow each other, 1 to 64 channels each");
    next += b.width;
  }
  if (next != layout_.c) throw std::invalid_argument("packed map: blocks do not cover the channels");
  if (layout_.n < 0 || layout_.h < 0 || layout_.w < 0)
    throw std::invalid_argument("packed map: negative size");
}

PackedMap::~PackedMap() {
  for (Chunk& c : chunks_) std::free(c.data);
}

void PackedMap::bind(int64_t n, void* index, void* values, size_t capacity) {
  layout_.n = n;
  masks_ = static_cast<uint64_t*>(index);
  const auto segments = static_cast<size_t>(n * layout_.h) * layout_.blocks.size();
  segments_ = reinterpret_cast<void**>(static_cast<unsigned char*>(index) +
                                       round64(segments * static_cast<size_t>(layout_.w) * 8));
  values_ = static_cast<unsigned char*>(values);
  capacity_ = values == nullptr || capacity < kPackedSlack ? 0 : capacity - kPackedSlack;
  slots_ = false;
  used_.store(0);
  for (Chunk& c : chunks_) c.used = 0;
  spilled_ = 0;
}

void PackedMap::bind_slots(int64_t n, void* index, void* values) {
  bind(n, index, values, 0);
  slots_ = true;
}

void PackedMap::resize(int64_t h, int64_t w) {
  layout_.h = h;
  layout_.w = w;
}

void* PackedMap::allocate(int64_t n, int64_t h, int64_t block, size_t bytes) {
  if (bytes == 0) return const_cast<unsigned char*>(kNothing);
  if (slots_) {
    const int64_t row = n * layout_.h + h, first = layout_.blocks[static_cast<size_t>(block)].first;
    return values_ + static_cast<size_t>((row * layout_.c + first) * layout_.w) * value_size(layout_.type);
  }
  bytes = (bytes + 3) & ~size_t{3};
  // While a reservation that failed is not yet given back, used_ is beyond the capacity and every other one
  // fails too: no two successful ones can overlap.
  if (used_.load(std::memory_order_relaxed) + bytes <= capacity_) {
    const size_t at = used_.fetch_add(bytes, std::memory_order_relaxed);
    if (at + bytes <= capacity_) return values_ + at;
    used_.fetch_sub(bytes, std::memory_order_relaxed);
  }
  return spill(bytes);
}

void* PackedMap::spill(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  spilled_ += bytes;
  for (Chunk& c : chunks_)
    if (c.used + bytes <= c.size) {
      void* p = c.data + c.used;
      c.used += bytes;
      return p;
    }
  const size_t size = bytes > (size_t{1} << 18) ? bytes : size_t{1} << 18;
  auto* data = static_cast<unsigned char*>(std::malloc(size + kPackedSlack));
  if (data == nullptr) throw std::bad_alloc();
  chunks_.push_back({data, size, bytes});
  return data;
}

size_t PackedMap::used_bytes() const { return used_.load(); }
size_t PackedMap::spilled_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return spilled_;
}

int64_t PackedMap::nonzeros() const {
  int64_t total = 0;
  const int64_t count = layout_.n * layout_.h * blocks() * layout_.w;
  for (int64_t i = 0; i < count; ++i) total += __builtin_popcountll(masks_[i]);
  return total;
}

void PackedLayout::set_scale(float scale, float top, int64_t first, int64_t count) {
  const auto all = static_cast<int64_t>(blocks.size());
  const int64_t end = count < 0 ? all : first + count;
  for (int64_t b = first; b < end && b < all; ++b) {
    blocks[static_cast<size_t>(b)].scale = scale;
    blocks[static_cast<size_t>(b)].top = top;
  }
}

size_t pack_row_scratch_bytes(int64_t w) { return round64(static_cast<size_t>(w) * 256 + 64); }

void pack_row(PackedMap& map, int64_t n, int64_t h, int64_t block, const float* src, int64_t pixel_stride,
              void* scratch) {
  const Kernels& o = kernels_for(active_isa());
  const PackedLayout& l = map.layout();
  auto* staged = static_cast<float*>(scratch);
  const int type = static_cast<int>(l.type);
  const ChannelBlock& cb = l.blocks[static_cast<size_t>(block)];
  kernels::EpilogueRow row{};
  row.acc = const_cast<float*>(src);  // only read
  row.acc_stride = pixel_stride;
  row.count = l.w;
  row.width = cb.width;
  const int64_t count = o.compress(row, type, cb.scale, cb.top, map.masks(n, h, block), staged);
  void* dst = map.allocate(n, h, block, static_cast<size_t>(count) * value_size(l.type));
  o.store_values(staged, count, type, dst);
  map.segment(n, h, block) = dst;
}

const float* segment_values(const PackedMap& map, int64_t n, int64_t h, int64_t block, int64_t count,
                            float* dst) {
  const PackedLayout& l = map.layout();
  const void* src = map.segment(n, h, block);
  if (l.type == ValueType::f32) return static_cast<const float*>(src);
  kernels_for(active_isa())
      .load_values(src, count, static_cast<int>(l.type), l.blocks[static_cast<size_t>(block)].scale, dst);
  return dst;
}

void unpack_row(const PackedMap& map, int64_t n, int64_t h, int64_t block, float* dst, int64_t pixel_stride) {
  const Kernels& o = kernels_for(active_isa());
  const PackedLayout& l = map.layout();
  const uint64_t* masks = map.masks(n, h, block);
  const ChannelBlock& cb = l.blocks[static_cast<size_t>(block)];
  const int64_t width = cb.width;
  const int type = static_cast<int>(l.type);
  if (l.type == ValueType::f32) {
    o.expand(masks, static_cast<const float*>(map.segment(n, h, block)), l.w, width, dst, pixel_stride);
    return;
  }
  // A pixel's worth of values at a time is enough scratch.
  const auto* src = static_cast<const unsigned char*>(map.segment(n, h, block));
  alignas(64) float values[64 + 16];
  for (int64_t x = 0; x < l.w; ++x) {
    const int64_t count = __builtin_popcountll(masks[x]);
    o.load_values(src, count, type, cb.scale, values);
    src += static_cast<size_t>(count) * value_size(l.type);
    o.expand(masks + x, values, 1, width, dst + x * pixel_stride, pixel_stride);
  }
}

void pack_map(PackedMap& map, const float* src, int64_t pixel_stride, int64_t first_block, int64_t count,
              int threads) {
  const PackedLayout& l = map.layout();
  if (count < 0) count = map.blocks() - first_block;
  if (count == 0) return;
  const int32_t channel = l.blocks[static_cast<size_t>(first_block)].first;
  parallel_for(l.n * l.h, threads, [&](int64_t row, int) {
    std::vector<unsigned char> memory(pack_row_scratch_bytes(l.w) + 64);
    auto* scratch =
        reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
    for (int64_t b = first_block; b < first_block + count; ++b)
      pack_row(map, row / l.h, row % l.h, b,
               src + row * l.w * pixel_stride + l.blocks[static_cast<size_t>(b)].first - channel,
               pixel_stride, scratch);
  });
}

void unpack_map(const PackedMap& map, float* dst, int64_t pixel_stride, int64_t first_block, int64_t count,
                int threads) {
  const PackedLayout& l = map.layout();
  if (count < 0) count = map.blocks() - first_block;
  if (count == 0) return;
  const int32_t channel = l.blocks[static_cast<size_t>(first_block)].first;
  parallel_for(l.n * l.h, threads, [&](int64_t row, int) {
    for (int64_t b = first_block; b < first_block + count; ++b)
      unpack_row(map, row / l.h, row % l.h, b,
                 dst + row * l.w * pixel_stride + l.blocks[static_cast<size_t>(b)].first - channel,
                 pixel_stride);
  });
}

}  // namespace actzip
