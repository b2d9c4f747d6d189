#define ACTZIP_ISA_NS isa_baseline
#define ACTZIP_ISA_ID Isa::baseline
#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
