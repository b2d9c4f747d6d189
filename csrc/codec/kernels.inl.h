// The inner loops of the codecs. Compiled once per instruction set by isa/*.cpp, with ACTZIP_ISA_NS set; see
// common/cpu.h for the rules. Three levels: portable C++; with BMI2 (pext and pdep move 8 bytes or four
// 16-bit symbols at a time in and out of bit streams); with AVX-512 VBMI2 (64 bytes at a time).
#include "codec/bits.inl.h"
#include "codec/checksum.inl.h"
#include "codec/fixed_width.inl.h"
#include "codec/golomb_decode.inl.h"
#include "codec/golomb_encode.inl.h"
#include "codec/golomb_size.inl.h"
#include "codec/kernels.h"
#include "codec/levels.inl.h"
#include "codec/masks.inl.h"
#include "codec/passes.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {

extern const Kernels kTable;
const Kernels kTable = {
    compress<uint8_t>,  compress<uint16_t>,
    compress<uint32_t>, expand<uint8_t>,
    expand<uint16_t>,   expand<uint32_t>,
    any_zero<uint8_t>,  any_zero<uint16_t>,
    any_zero<uint32_t>, ones,
    pack<uint8_t>,      pack<uint16_t>,
    unpack<uint8_t>,    unpack<uint16_t>,
    eg_encode_u8,       eg_encode_u16,
    positions,          eg_decode_u8,
    eg_decode_u16,      eg_bounds_u8,
    eg_bounds_u16,      eg_zeros_u8,
    eg_zeros_u16,       range<uint8_t>,
    range<int8_t>,      range<uint16_t>,
    range<int16_t>,     zigzag<uint8_t>,
    zigzag<uint16_t>,   unzigzag<uint8_t>,
    unzigzag<uint16_t>, to_levels_any,
    from_levels,        crc32c,
};

}  // namespace actzip::codec::ACTZIP_ISA_NS
