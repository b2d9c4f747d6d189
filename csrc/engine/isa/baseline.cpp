#include "common/isa/baseline.h"

#include "engine/nodes/pool.inl.h"
#include "engine/rows.inl.h"
