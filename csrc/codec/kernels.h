// The inner loops of the codecs, one implementation per instruction set (kernels.inl.h, isa/), all with
// exactly the same results. `kernels()` gives the table of the instruction set in use.
//
// Bit streams are filled from the least significant bit of each byte. "Slack" is memory after the end that
// may be read or overwritten with anything.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actzip::codec {

// The end of a bit stream being written: `have` < 64 bits wait in `acc`. Needs 16 bytes of slack after what
// is written.
struct BitSink {
  uint8_t* p = nullptr;
  uint64_t acc = 0;
  uint64_t have = 0;

  // Writes what waits; returns the end of the stream.
  uint8_t* finish() {
    while (have > 0) {
      *p++ = static_cast<uint8_t>(acc);
      acc >>= 8;
      have = have > 8 ? have - 8 : 0;
    }
    return p;
  }
};

// What eg_decode found.
enum class EgStatus : int { ok = 0, too_long = 1, exhausted = 2, too_large = 3 };

struct Kernels {
  // Splits s[0, n) into a mask (bit i set where s[i] != 0, then xor `flip`, which is 0 or 0xff; bits after n
  // are zero; ceil(n / 8) bytes, no slack) and the non-zero symbols in order (64 elements of slack,
  // unaligned); s has 64 readable bytes of slack. Returns how many are not zero.
  size_t (*compress8)(const uint8_t* s, size_t n, uint8_t flip, uint8_t* mask, uint8_t* values);
  size_t (*compress16)(const uint16_t* s, size_t n, uint8_t flip, uint8_t* mask, uint16_t* values);
  size_t (*compress32)(const uint32_t* s, size_t n, uint8_t flip, uint8_t* mask, uint32_t* values);

  // The inverse: writes exactly out[0, n). `values` holds as many elements as the mask (xor flip) has ones
  // below n, and 64 readable bytes of slack, as has `mask`; it need not be aligned.
  void (*expand8)(const uint8_t* mask, uint8_t flip, const uint8_t* values, size_t n, uint8_t* out);
  void (*expand16)(const uint8_t* mask, uint8_t flip, const uint16_t* values, size_t n, uint16_t* out);
  void (*expand32)(const uint8_t* mask, uint8_t flip, const uint32_t* values, size_t n, uint32_t* out);

  // Whether one of v[0, n), which need not be aligned, is zero.
  bool (*any_zero8)(const uint8_t* v, size_t n);
  bool (*any_zero16)(const uint16_t* v, size_t n);
  bool (*any_zero32)(const uint32_t* v, size_t n);

  // Ones in p[0, n).
  size_t (*ones)(const uint8_t* p, size_t n);

  // `bits` low bits of each of n symbols, appended to the stream; symbols are below 2^bits; 64 readable bytes
  // of slack after them.
  void (*pack8)(const uint8_t* s, size_t n, int bits, BitSink* out);
  void (*pack16)(const uint16_t* s, size_t n, int bits, BitSink* out);
  // The inverse: writes exactly out[0, n); 16 readable bytes of slack after the stream.
  void (*unpack8)(const uint8_t* in, size_t n, int bits, uint8_t* out);
  void (*unpack16)(const uint8_t* in, size_t n, int bits, uint16_t* out);

  // Order-k exponential-Golomb codes of values[i] - bias, appended to two streams: prefixes (zeros closed by
  // a one) and suffixes. values[i] >= bias; 64 readable bytes of slack.
  void (*eg_encode8)(const uint8_t* values, size_t n, int k, int bias, BitSink* prefix, BitSink* suffix);
  void (*eg_encode16)(const uint16_t* values, size_t n, int k, int bias, BitSink* prefix, BitSink* suffix);

  // Positions (modulo 256) of the ones of the bit stream in[0, n), which has `count` of them; 64 readable
  // bytes of slack after the stream, 64 writable ones after out[count]. False if 64 zeros lie in a row at a
  // multiple of 64.
  bool (*positions)(const uint8_t* in, size_t n, uint8_t* out);

  // Decodes n codes: at[-1 .. n) are positions of the ones that close the prefixes (the one before the first
  // included), suffix bits from *bit on (at most `bits_left_end` of the stream; 64 readable bytes of slack).
  // On success *bit is behind the last suffix, and values[0, n) are written (64 elements of slack). Values
  // above `most` are an error.
  EgStatus (*eg_decode8)(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                         uint64_t end, uint64_t* bit, uint8_t* values);
  EgStatus (*eg_decode16)(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                          uint64_t end, uint64_t* bit, uint16_t* values);

  // With v = max(s[i], bias) - bias and b its bit length: sum[j] += max(b - j, 0) for j in 0..17. Returns the
  // number of s[i] >= bias. The slack after s: 64 bytes.
  size_t (*eg_bounds8)(const uint8_t* s, size_t n, int bias, uint64_t* sum);
  size_t (*eg_bounds16)(const uint16_t* s, size_t n, int bias, uint64_t* sum);
  // Sum of floor(log2((v >> k) + 1)): the zeros of all prefixes of order k.
  uint64_t (*eg_zeros8)(const uint8_t* s, size_t n, int bias, int k);
  uint64_t (*eg_zeros16)(const uint16_t* s, size_t n, int bias, int k);

  // Lowers *least and raises *greatest to the range of s[0, n).
  void (*range_u8)(const uint8_t* s, size_t n, int* least, int* greatest);
  void (*range_i8)(const uint8_t* s, size_t n, int* least, int* greatest);
  void (*range_u16)(const uint8_t* s, size_t n, int* least, int* greatest);
  void (*range_i16)(const uint8_t* s, size_t n, int* least, int* greatest);
  // 0, -1, 1, -2 ... to 0, 1, 2, 3 ... in place, and back.
  void (*zigzag8)(uint8_t* s, size_t n);
  void (*zigzag16)(uint16_t* s, size_t n);
  void (*unzigzag8)(uint8_t* s, size_t n);
  void (*unzigzag16)(uint16_t* s, size_t n);

  // Levels of split networks: out[i] = min(most, max(0, x[i] * inverse + rounding)) rounded down; signed
  // (then two's complement): by its magnitude, with x's sign. False if an x is not finite.
  bool (*to_levels)(const float* x, size_t n, float inverse, float rounding, float most, bool is_signed,
                    uint8_t* out);
  // out[i] = table[q[i]] * step; a table of 256. few: all q are below 32.
  void (*from_levels)(const uint8_t* q, size_t n, const float* table, float step, bool few, float* out);

  // CRC-32C, see crc32c.h.
  uint32_t (*crc32c)(const uint8_t* p, size_t n);
};

const Kernels& kernels();

// What 1024 zero bytes after it do to a CRC-32C register whose byte i has value j.
extern const uint32_t (&kCrcShift1024)[4][256];
uint32_t crc32c_portable(const uint8_t* p, size_t n);

extern const uint8_t kBytePositions[256][8];  // positions of the ones of a byte, then zeros

}  // namespace actzip::codec
