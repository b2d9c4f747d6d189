// Internal: the table of convolution kernels. One row a kernel drives dispatch, tests and benchmarks.
#pragma once

#include <memory>
#include <vector>

#include "kernels/conv.h"

namespace actzip {

struct Variant;

// What rows share that are computed alike: which problems they can compute, and the Conv that does. Each
// family is defined in its own *_conv.cpp.
struct Family {
  bool (*can)(const Variant& v, const ConvProblem& p);
  std::unique_ptr<Conv> (*make)(const ConvProblem& p, const Variant& v, Isa isa, const float* weight,
                                const float* bias, const std::shared_ptr<const void>& owner);
};
extern const Family kSparse;      // a tap at a time: sparse-*, pair-*
extern const Family kSparseRow;   // the taps of a kernel row for an output pixel: row-*
extern const Family kSparseTaps;  // the taps of a kernel row for an input pixel: taps-*
extern const Family kDense;
extern const Family kLines;  // few output channels: vectors along the rows
extern const Family kWinograd;
extern const Family kCookToom;  // long one-dimensional kernels
extern const Family kDepthwise;

struct Variant {
  KernelRow row;
  const Family* family;
  int nv;        // vectors of the widest oc tile
  int64_t tile;  // output pixels whose accumulators are kept together
};

const std::vector<Variant>& variants(Isa isa);
bool computes(const Variant& v, const ConvProblem& p);

template <class C>
std::unique_ptr<Conv> make_as(const ConvProblem& p, const Variant& v, Isa isa, const float* weight,
                              const float* bias, const std::shared_ptr<const void>&) {
  return std::make_unique<C>(p, v, isa, weight, bias);
}

inline bool is_depthwise(const ConvProblem& p) {
  return p.groups > 1 && p.groups == p.ic && p.groups == p.oc;
}

}  // namespace actzip
