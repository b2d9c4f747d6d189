#include "common/isa/baseline.h"

#include "codec/kernels.inl.h"
#include "codec/rans.inl.h"
