#include "common/isa/baseline.h"

#include "kernels/kernels.inl.h"
