#include "engine/rows.h"

namespace actzip::engine {

#define ACTZIP_DECLARE(name) \
  namespace isa_##name {     \
    extern const Rows kRows; \
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

const Rows& rows_for(Isa isa) {
  switch (isa) {
#ifdef ACTZIP_HAVE_AVX2
    case Isa::avx2:
      return isa_avx2::kRows;
#endif
#ifdef ACTZIP_HAVE_AVX512
    case Isa::avx512:
      return isa_avx512::kRows;
#endif
#ifdef ACTZIP_HAVE_AVX512_ICL
    case Isa::avx512_icl:
      return isa_avx512_icl::kRows;
#endif
#ifdef ACTZIP_HAVE_NEON
    case Isa::neon:
      return isa_neon::kRows;
#endif
    default:
      return isa_baseline::kRows;
  }
}

}  // namespace actzip::engine
