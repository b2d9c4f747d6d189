#include "kernels/kernels.h"

#include "common/isa_table.h"

namespace actzip::kernels {

ACTZIP_ISA_TABLE(kernels_for, Kernels, kKernels)

}  // namespace actzip::kernels
