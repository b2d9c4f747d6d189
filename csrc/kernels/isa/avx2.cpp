#include "common/isa/avx2.h"

#include "kernels/kernels.inl.h"
