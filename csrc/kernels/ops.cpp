#include "kernels/ops.h"

namespace actzip::kernels {

// One line an instruction set: see isa/.
#define ACTZIP_DECLARE(isa) \
  namespace isa_##isa {     \
    const Ops& ops();       \
  }
ACTZIP_DECLARE(baseline)
#ifdef ACTZIP_HAVE_AVX2
ACTZIP_DECLARE(avx2)
#endif
#ifdef ACTZIP_HAVE_AVX512
ACTZIP_DECLARE(avx512)
#endif
#ifdef ACTZIP_HAVE_AVX512_ICL
ACTZIP_DECLARE(avx512_icl)
#endif
#ifdef ACTZIP_HAVE_NEON
ACTZIP_DECLARE(neon)
#endif

const Ops& ops_for(Isa isa) {
  switch (isa) {
#ifdef ACTZIP_HAVE_AVX2
    case Isa::avx2:
      return isa_avx2::ops();
#endif
#ifdef ACTZIP_HAVE_AVX512
    case Isa::avx512:
      return isa_avx512::ops();
#endif
#ifdef ACTZIP_HAVE_AVX512_ICL
    case Isa::avx512_icl:
      return isa_avx512_icl::ops();
#endif
#ifdef ACTZIP_HAVE_NEON
    case Isa::neon:
      return isa_neon::ops();
#endif
    default:
      return isa_baseline::ops();
  }
}

}  // namespace actzip::kernels
