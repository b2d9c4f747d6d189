#define ACTZIP_ISA_NS avx512
#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
