#include "common/isa/avx512_icl.h"

#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
