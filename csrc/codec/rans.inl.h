// The inner loops of `rans`. Compiled once per instruction set by isa/*.cpp, with ACTZIP_ISA_NS set.
#pragma once

#include "codec/rans_decode.inl.h"
#include "codec/rans_encode.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {

extern const RansKernels kRansTable;
const RansKernels kRansTable = {rans_decode_group, rans_encode_group, rans_costs};

}  // namespace actzip::codec::ACTZIP_ISA_NS
