#include "engine/rows.h"

#include "common/isa_table.h"

namespace actzip::engine {

ACTZIP_ISA_TABLE(rows_for, Rows, kRows)

}  // namespace actzip::engine
