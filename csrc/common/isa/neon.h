#pragma once
#define ACTZIP_ISA_NS isa_neon
#define ACTZIP_ISA_ID Isa::neon
#define ACTZIP_VL 4
