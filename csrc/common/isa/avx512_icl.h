#pragma once
#define ACTZIP_ISA_NS isa_avx512_icl
#define ACTZIP_ISA_ID Isa::avx512_icl
#define ACTZIP_VL 16
