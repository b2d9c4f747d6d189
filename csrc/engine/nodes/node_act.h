// Internal: the activation that a node does.
#pragma once

#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "engine/nodes/attributes.h"
#include "engine/rows.h"

namespace actzip::engine {

// The member of an enum of functions.h that plans call `name`.
template <class E, size_t N>
E named(const NodeSpec& s, const char* const (&names)[N], const char* what, const std::string& name) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return static_cast<E>(i);
  fail(s, std::string(what) + " '" + name + "' is not known");
}

inline void check_quantizer(const NodeSpec& s, float step, float lo, float hi) {
  if (!(step > 0 && std::isfinite(step) && lo > -0x1p22f && lo <= hi && hi < 0x1p22f))
    fail(s, "a quantizer needs a step above 0 and lo <= hi, both below 2^22");
}

// The activation of a node: strings["act"], floats act_alpha ..., array act_param (1 or C numbers).
struct NodeAct {
  Act act;
  std::vector<float> param;

  NodeAct() = default;
  NodeAct(NodeSpec& s, int64_t channels) {
    const auto it = s.strings.find("act");
    if (it == s.strings.end()) return;
    act.fn = named<Fn>(s, kFunctionNames, "activation", it->second);
    act.alpha = static_cast<float>(number(s, "act_alpha", 0));
    act.beta = static_cast<float>(number(s, "act_beta", 0));
    act.lo = static_cast<float>(number(s, "act_lo", -std::numeric_limits<float>::infinity()));
    act.hi = static_cast<float>(number(s, "act_hi", std::numeric_limits<float>::infinity()));
    act.limit = static_cast<float>(number(s, "act_limit", 0));
    param = take(s, "act_param", -1);
    if (act.fn == Fn::quantize) check_quantizer(s, act.alpha, act.lo, act.hi);
    const bool needs = act.fn == Fn::threshold || act.fn == Fn::prelu;
    if (needs != !param.empty() || (param.size() > 1 && static_cast<int64_t>(param.size()) != channels))
      fail(s, "activation parameters: " + std::to_string(param.size()) + " numbers for " +
                  std::to_string(channels) + " channels");
  }
  explicit operator bool() const { return act.fn != Fn::none; }
  // On channels [first, first + n) of one pixel.
  void apply(const Rows& rows, float* x, int64_t first, int64_t n) const {
    if (act.fn == Fn::none) return;
    const bool each = param.size() > 1;
    rows.activate(act, x, x, n, param.empty() ? nullptr : param.data() + (each ? first : 0), each ? 1 : 0);
  }
  void apply(const Rows& rows, const float* in, float* out, int64_t first, int64_t n) const {
    const bool each = param.size() > 1;
    rows.activate(act, in, out, n, param.empty() ? nullptr : param.data() + (each ? first : 0), each ? 1 : 0);
  }
};

}  // namespace actzip::engine
