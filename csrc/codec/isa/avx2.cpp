#include "common/isa/avx2.h"

#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
