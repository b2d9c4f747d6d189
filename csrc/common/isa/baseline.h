#pragma once
#define ACTZIP_ISA_NS isa_baseline
#define ACTZIP_ISA_ID Isa::baseline
#define ACTZIP_VL 4
