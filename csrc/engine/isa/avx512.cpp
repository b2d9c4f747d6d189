#include "common/isa/avx512.h"

#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
