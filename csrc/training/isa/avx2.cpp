#include "common/isa/avx2.h"

#include "training/saved.inl.h"
