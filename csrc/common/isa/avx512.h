#pragma once
#define ACTZIP_ISA_NS isa_avx512
#define ACTZIP_ISA_ID Isa::avx512
#define ACTZIP_VL 16
