#include "common/isa/neon.h"

#include "engine/nodes/pool.inl.h"
#include "engine/rows.inl.h"
