// The instruction sets that are compiled in, once for every area that dispatches on them.
//
//   ACTZIP_ISA_TABLE(pool_for, PoolTable, kPool)
//
// declares `extern const PoolTable kPool` in isa_baseline, isa_avx2 and so on (the files in isa/ define them)
// and defines `const PoolTable& pool_for(Isa isa)`: the table of that instruction set, the baseline's where
// it is not compiled in here.
#pragma once

#include "common/cpu.h"

#ifdef ACTZIP_HAVE_AVX2
#define ACTZIP_ON_AVX2(use, type, name) use(avx2, type, name)
#else
#define ACTZIP_ON_AVX2(use, type, name)
#endif
#ifdef ACTZIP_HAVE_AVX512
#define ACTZIP_ON_AVX512(use, type, name) use(avx512, type, name)
#else
#define ACTZIP_ON_AVX512(use, type, name)
#endif
#ifdef ACTZIP_HAVE_AVX512_ICL
#define ACTZIP_ON_AVX512_ICL(use, type, name) use(avx512_icl, type, name)
#else
#define ACTZIP_ON_AVX512_ICL(use, type, name)
#endif
#ifdef ACTZIP_HAVE_NEON
#define ACTZIP_ON_NEON(use, type, name) use(neon, type, name)
#else
#define ACTZIP_ON_NEON(use, type, name)
#endif

#define ACTZIP_EACH_ISA(use, type, name)                                                      \
  use(baseline, type, name) ACTZIP_ON_AVX2(use, type, name) ACTZIP_ON_AVX512(use, type, name) \
      ACTZIP_ON_AVX512_ICL(use, type, name) ACTZIP_ON_NEON(use, type, name)

#define ACTZIP_ISA_DECLARE(set, type, name) \
  namespace isa_##set {                     \
    extern const type name;                 \
  }
#define ACTZIP_ISA_CASE(set, type, name) \
  case Isa::set:                         \
    return isa_##set::name;

#define ACTZIP_ISA_TABLE(function, type, name)     \
  ACTZIP_EACH_ISA(ACTZIP_ISA_DECLARE, type, name)  \
  const type& function(Isa isa) {                  \
    switch (isa) {                                 \
      ACTZIP_EACH_ISA(ACTZIP_ISA_CASE, type, name) \
      default:                                     \
        return isa_baseline::name;                 \
    }                                              \
  }
