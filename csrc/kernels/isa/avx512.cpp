#include "common/isa/avx512.h"

#include "kernels/kernels.inl.h"
