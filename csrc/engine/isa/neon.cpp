#include "common/isa/neon.h"

#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
