#define ACTZIP_ISA_NS avx512_icl
#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
