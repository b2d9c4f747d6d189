#include "common/isa/avx512.h"

#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
