#include "common/isa/avx512.h"

#include "engine/nodes/pool.inl.h"
#include "engine/rows.inl.h"
