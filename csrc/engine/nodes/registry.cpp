// The operators of plans, one row each: make_<operator> is defined in the operator's file.
#include "engine/nodes/attributes.h"

// clang-format off
#define ACTZIP_OPERATORS(row) \
  row(activation) \
  row(adaptive_pool) \
  row(argmax) \
  row(batch_norm) \
  row(binary) \
  row(concat) \
  row(conv) \
  row(conv_depthwise) \
  row(conv_pool) \
  row(copy) \
  row(depth_to_space) \
  row(dilate) \
  row(expand) \
  row(grid_sample) \
  row(group_norm) \
  row(layer_norm) \
  row(linear) \
  row(lrn) \
  row(matmul) \
  row(pad) \
  row(pool) \
  row(recurrent) \
  row(reduce) \
  row(resize) \
  row(slice) \
  row(softmax) \
  row(take) \
  row(topk) \
  row(transpose)
// clang-format on

namespace actzip::engine {

#define ACTZIP_DECLARE(name) std::unique_ptr<Node> make_##name(NodeSpec, const Values&, Isa);
ACTZIP_OPERATORS(ACTZIP_DECLARE)
#undef ACTZIP_DECLARE

namespace {

struct Operator {
  const char* name;
  std::unique_ptr<Node> (*make)(NodeSpec, const Values&, Isa);
};
#define ACTZIP_ROW(name) {#name, make_##name},
constexpr Operator kOperators[] = {ACTZIP_OPERATORS(ACTZIP_ROW)};
#undef ACTZIP_ROW

}  // namespace

std::vector<std::string> operator_names() {
  std::vector<std::string> names;
  for (const Operator& o : kOperators) names.emplace_back(o.name);
  return names;
}

std::unique_ptr<Node> make_node(NodeSpec s, const Values& values, Isa isa) {
  for (const Operator& o : kOperators)
    if (s.op == o.name) return o.make(std::move(s), values, isa);
  fail(s, "is not known");
}

}  // namespace actzip::engine
