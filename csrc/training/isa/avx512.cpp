#include "common/isa/avx512.h"

#include "training/saved.inl.h"
