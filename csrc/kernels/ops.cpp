#include "kernels/ops.h"

#include "common/isa_table.h"

namespace actzip::kernels {

ACTZIP_ISA_TABLE(ops_for, Ops, kOps)

}  // namespace actzip::kernels
