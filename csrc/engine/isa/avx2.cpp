#include "common/isa/avx2.h"

#include "engine/nodes/pool.inl.h"
#include "engine/rows.inl.h"
