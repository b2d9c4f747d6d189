#include "common/isa/avx512_icl.h"

#include "training/saved.inl.h"
