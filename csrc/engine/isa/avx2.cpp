#include "common/isa/avx2.h"

#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
