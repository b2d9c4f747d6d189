#define ACTZIP_ISA_NS baseline
#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
