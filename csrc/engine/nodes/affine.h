// Internal: what maps share, see affine.cpp.
#pragma once

#include <memory>

#include "engine/node.h"

namespace actzip::engine {

std::unique_ptr<Node> make_affine(NodeSpec s, const Values& values, Isa isa);

}  // namespace actzip::engine
