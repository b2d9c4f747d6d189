// The inner loops of `rans`. Compiled once per instruction set by isa/*.cpp, with ACTZIP_ISA_NS set.
#pragma once

#include "codec/rans_decode.inl.h"
#include "codec/rans_encode.inl.h"
#include "codec/rans_pairs.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {

extern const RansKernels kRansTable;
const RansKernels kRansTable = {rans_decode_group, rans_encode_group, rans_costs,
                                rans_tokens8,      rans_tokens16,     rans_pairs};

}  // namespace actzip::codec::ACTZIP_ISA_NS
