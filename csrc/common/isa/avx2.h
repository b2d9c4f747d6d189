#pragma once
#define ACTZIP_ISA_NS isa_avx2
#define ACTZIP_ISA_ID Isa::avx2
#define ACTZIP_VL 8
