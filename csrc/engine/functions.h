// The elementwise functions of the engine, one row each. A row names a member of the enum, what plans call it
// (strings["act"], strings["kind"]) and its definition in functions.inl.h: a new function is a row here and a
// definition there.
#pragma once

#include <cstdint>

// NaN in, NaN out, for all of them. The numbers that some take are in Act; `threshold` and `prelu` take one
// more, the same for all elements or one each.
// clang-format off
#define ACTZIP_FUNCTIONS(row) \
  row(none) \
  row(relu) \
  row(clip) /* min(max(x, lo), hi) */ \
  row(threshold) /* x <= param ? 0 : min(x, hi) */ \
  row(leaky_relu) \
  row(prelu) /* slope: param */ \
  row(elu) \
  row(selu) \
  row(celu) \
  row(softplus) \
  row(softsign) \
  row(sigmoid) \
  row(logsigmoid) \
  row(hardsigmoid) \
  row(tanh) \
  row(silu) \
  row(gelu) \
  row(gelu_tanh) \
  row(hardswish) \
  row(scaled_hardswish) \
  row(mish) \
  row(exp) \
  row(log) \
  row(sqrt) \
  row(rsqrt) \
  row(reciprocal) \
  row(square) \
  row(neg) \
  row(abs) \
  row(sign) /* of NaN: 0, as in PyTorch */ \
  row(floor) \
  row(ceil) \
  row(round) \
  row(quantize) /* alpha * min(max(round(x / alpha), lo), hi), lo and hi integers below 2^22 */ \
  row(trunc) \
  row(erf) \
  row(sin) \
  row(cos) \
  row(tan) \
  row(atan) \
  row(asin) \
  row(acos) \
  row(sinh) \
  row(cosh) \
  row(asinh) \
  row(acosh) \
  row(atanh)

#define ACTZIP_BINARY_FUNCTIONS(row) \
  row(add) \
  row(sub) \
  row(mul) \
  row(div) \
  row(max) \
  row(min) \
  row(pow) \
  row(gt) \
  row(ge) \
  row(lt) \
  row(le) \
  row(eq) \
  row(ne) \
  row(keep) \
  row(drop)
// clang-format on

namespace actzip::engine {

#define ACTZIP_MEMBER(name) name,
enum class Fn : int { ACTZIP_FUNCTIONS(ACTZIP_MEMBER) };
enum class BinaryFn : int { ACTZIP_BINARY_FUNCTIONS(ACTZIP_MEMBER) };
#undef ACTZIP_MEMBER

#define ACTZIP_NAME(name) #name,
inline constexpr const char* kFunctionNames[] = {ACTZIP_FUNCTIONS(ACTZIP_NAME)};
inline constexpr const char* kBinaryNames[] = {ACTZIP_BINARY_FUNCTIONS(ACTZIP_NAME)};
#undef ACTZIP_NAME

struct Act {
  Fn fn = Fn::none;
  float alpha = 0, beta = 0, lo = 0, hi = 0, limit = 0;
};

}  // namespace actzip::engine
