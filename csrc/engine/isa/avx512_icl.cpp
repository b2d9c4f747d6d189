#include "common/isa/avx512_icl.h"

#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
