#include "common/isa/avx512_icl.h"

#include "kernels/kernels.inl.h"
