#define ACTZIP_ISA_NS isa_avx2
#define ACTZIP_ISA_ID Isa::avx2
#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
