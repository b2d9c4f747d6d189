#include "common/isa/neon.h"

#include "kernels/kernels.inl.h"
