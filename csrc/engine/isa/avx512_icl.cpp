#include "common/isa/avx512_icl.h"

#include "engine/nodes/pool.inl.h"
#include "engine/rows.inl.h"
