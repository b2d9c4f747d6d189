#define ACTZIP_ISA_NS isa_avx512
#define ACTZIP_ISA_ID Isa::avx512
#include "engine/pool.inl.h"
#include "engine/rows.inl.h"
