// Packed activation maps: only the non-zero values are stored.
//
// A map is N x H x W pixels of C channels (NHWC). Its channels are cut into blocks of at most 64
// (`ChannelBlock`), in order and without gaps. For every pixel and block there is a 64-bit mask (bit i:
// channel first + i is not zero); for every image row and block there is one *segment*, the non-zero values
// of the row's pixels from left to right, each pixel's in channel order, nothing between them. Pixel x of a
// segment starts after the popcounts of the masks of the pixels left of it.
//
//   masks     uint64_t [n][h][block][w]
//   segments  void*    [n][h][block]      into the map's value region, or into a spill chunk
//   values    ValueType, aligned to its size only
//
// Memory: (1/8 + size * density) bytes an element and 8 bytes a segment; dense float32 takes 4. Segments are
// allocated as rows are finished, from a value region whose capacity comes from calibrated densities; when a
// map has more non-zero values than that, further chunks are taken from the heap (`spilled_bytes`), kept for
// later runs and never needed for correctness: a map may be of any density, 0 and 1 included.
//
// A concatenation is a map whose block list is the concatenation of its parts' lists: each producer writes
// its own blocks (`first_block`), and nothing is copied, whatever the parts' channel counts.
//
// NaN and infinities are non-zero values and are kept (u8, u16: NaN and what is too large saturate). -0.0 is
// zero.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace actzip {

enum class ValueType : int {
  f32 = 0,
  f16 = 1,  // IEEE half; values too large become infinite, those that round to zero become zero
  u8 = 2,   // value = scale * q, q = value / scale rounded to nearest even, in 0..top; negative is zero
  u16 = 3,  // the same, two bytes
};
inline constexpr size_t value_size(ValueType t) {
  return t == ValueType::f32 ? 4 : t == ValueType::u8 ? 1 : 2;
}

// Channels [first, first + width) of the map; 1 <= width <= 64. u8 and u16 maps only: the quantizer's scale
// and its greatest integer (0: what the type holds, 255 or 65535), which blocks of one map may have of their
// own. Division and product are IEEE float32 operations: the integers are those of the training-time
// quantizer and of the codecs.
struct ChannelBlock {
  int32_t first = 0;
  int32_t width = 0;
  float scale = 1.0f;
  float top = 0.0f;
};

// The block list that every producer of `channels` channels uses: 64, 64, ..., the rest.
std::vector<ChannelBlock> split_channels(int64_t channels);
// The block list of a concatenation of maps with these channel counts.
std::vector<ChannelBlock> split_channels(const std::vector<int64_t>& parts);

struct PackedLayout {
  int64_t n = 1, h = 1, w = 1, c = 0;  // n: of the current run (see PackedMap::bind)
  std::vector<ChannelBlock> blocks;    // covers [0, c)
  ValueType type = ValueType::f32;

  // The scale and greatest integer of blocks [first, first + count), count < 0: to the last.
  void set_scale(float scale, float top = 0.0f, int64_t first = 0, int64_t count = -1);

  int64_t elements() const { return n * h * w * c; }
  // Bytes of masks and segment table: a multiple of 64.
  size_t index_bytes() const;
  // Bytes of the values at `density` (0 to 1), a multiple of 64, the slack for wide loads included.
  size_t value_bytes(double density) const;
};

// Bytes readable past the end of any segment (wide loads may touch them).
inline constexpr size_t kPackedSlack = 64;

// One map and the memory it lies in. The object owns the spill chunks only; index and value region belong to
// the caller (an arena), who keeps them alive and aligned to 64 bytes. Not copyable, not movable. One writer
// per (row, block); any number of threads may write different ones at once. Reading starts after all writers
// are done.
class PackedMap {
 public:
  explicit PackedMap(PackedLayout layout);
  ~PackedMap();
  PackedMap(const PackedMap&) = delete;
  PackedMap& operator=(const PackedMap&) = delete;

  // Lays the map into memory and forgets its content: call before the first producer of each run. `n`
  // replaces layout().n. index: index_bytes() of that layout; values: `capacity` bytes, of which the last
  // kPackedSlack are slack (capacity 0 and values null: everything spills).
  void bind(int64_t n, void* index, void* values, size_t capacity);
  // The same, but every segment gets a place of its own, as large as it can be: `values` has room for all
  // elements, and the order in which segments are written does not matter.
  void bind_slots(int64_t n, void* index, void* values);
  // Other height and width for the next bind (dynamic shapes).
  void resize(int64_t h, int64_t w);

  const PackedLayout& layout() const { return layout_; }
  int64_t blocks() const { return static_cast<int64_t>(layout_.blocks.size()); }

  uint64_t* masks(int64_t n, int64_t h, int64_t block) const {
    return masks_ + ((n * layout_.h + h) * blocks() + block) * layout_.w;
  }
  void*& segment(int64_t n, int64_t h, int64_t block) const {
    return segments_[(n * layout_.h + h) * blocks() + block];
  }

  // Where the `bytes` of a segment are to be: in the value region or a spill chunk, aligned to 4. Never null,
  // 0 bytes included; throws std::bad_alloc. Safe from several threads.
  void* allocate(int64_t n, int64_t h, int64_t block, size_t bytes);

  size_t used_bytes() const;     // of the value region, since bind
  size_t spilled_bytes() const;  // beyond it, since bind
  int64_t nonzeros() const;      // by counting masks; a finished map only

 private:
  void* spill(size_t bytes);

  PackedLayout layout_;
  uint64_t* masks_ = nullptr;
  void** segments_ = nullptr;
  unsigned char* values_ = nullptr;
  size_t capacity_ = 0;
  bool slots_ = false;
  std::atomic<size_t> used_{0};
  struct Chunk {
    unsigned char* data;
    size_t size, used;
  };
  mutable std::mutex mutex_;
  std::vector<Chunk> chunks_;
  size_t spilled_ = 0;
};

// Scratch of pack_row for rows of `w` pixels: bytes, aligned to 64.
size_t pack_row_scratch_bytes(int64_t w);

// Packs one row of one block: pixel x's channels are src[x * pixel_stride ...], width of the block. Writes
// masks and segment of (n, h, block). `scratch`: pack_row_scratch_bytes(w).
void pack_row(PackedMap& map, int64_t n, int64_t h, int64_t block, const float* src, int64_t pixel_stride,
              void* scratch);

// The reverse: every channel of the block is written (zeros too) to dst[x * pixel_stride ...].
void unpack_row(const PackedMap& map, int64_t n, int64_t h, int64_t block, float* dst, int64_t pixel_stride);

// The values of one segment as float32: `count` is what the row's masks hold together. For f32 maps the
// segment itself (dst untouched), else dst, which needs room for count + 16 floats.
const float* segment_values(const PackedMap& map, int64_t n, int64_t h, int64_t block, int64_t count,
                            float* dst);

// Whole maps, in parallel over rows. Dense side: NHWC, pixel x of row h of image n at
// ptr + ((n * H + h) * W + x) * pixel_stride, channel 0 of the blocks' first one there. [first_block,
// first_block + count) of the map; count < 0: to the last.
void pack_map(PackedMap& map, const float* src, int64_t pixel_stride, int64_t first_block = 0,
              int64_t count = -1, int threads = 0);
void unpack_map(const PackedMap& map, float* dst, int64_t pixel_stride, int64_t first_block = 0,
                int64_t count = -1, int threads = 0);

}  // namespace actzip
