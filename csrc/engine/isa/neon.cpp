#define ACTZIP_ISA_NS isa_neon
#define ACTZIP_ISA_ID Isa::neon
#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
