#define ACTZIP_ISA_NS avx2
#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
