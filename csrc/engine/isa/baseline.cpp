#include "common/isa/baseline.h"

#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
