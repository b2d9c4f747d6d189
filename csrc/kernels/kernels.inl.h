// Every kernel, written once with compiler vectors of ACTZIP_VL floats and compiled per instruction set; the
// table of them that kernels.cpp dispatches to.
#include <utility>

#include "common/vectors.inl.h"
#include "kernels/cook_toom.inl.h"
#include "kernels/dense.inl.h"
#include "kernels/depthwise.inl.h"
#include "kernels/epilogue.inl.h"
#include "kernels/kernels.h"
#include "kernels/lines.inl.h"
#include "kernels/pack.inl.h"
#include "kernels/sparse.inl.h"
#include "kernels/winograd.inl.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// FMAs in registers: the peak that shares are measured against.
double peak(int64_t rounds) {
  constexpr int N = kRegisters == 32 ? 24 : 12;
  vf a[N];
  for (int j = 0; j < N; ++j) a[j] = splat(0.001f * static_cast<float>(j));
  vf b = splat(0.9999f), c = splat(0.0001f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int j = 0; j < N; ++j) a[j] = a[j] * b + c;
  }
  vf s{};
  for (int j = 0; j < N; ++j) s += a[j];
  volatile float sink = s[0];
  (void)sink;
  return static_cast<double>(rounds) * N * VL * 2;
}

// put_*: entries [1], [2] ... up to the last template argument that the registers suffice for.
template <int NV>
constexpr void put_sparse(Kernels& k) {
  if constexpr (NV >= 1) {
    k.sparse[NV] = sparse_run<NV>;
    k.sparse_row[NV] = sparse_row_run<NV>;
    put_sparse<NV - 1>(k);
  }
}
template <int NV>
constexpr void put_pairs(Kernels& k) {
  if constexpr (NV >= 1) {
    k.sparse_pair[NV] = sparse_pair_run<NV>;
    put_pairs<NV - 1>(k);
  }
}
template <int NV>
constexpr void put_taps_pairs(Kernels& k) {
  if constexpr (NV >= 1) {
    k.sparse_taps_pair[NV] = sparse_taps_pair_run<NV>;
    put_taps_pairs<NV - 1>(k);
  }
}
template <int NV, int MR>
constexpr void put_dense(Kernels& k) {
  if constexpr (MR >= 1) {
    if (k.dense_mr[NV] < MR) k.dense_mr[NV] = MR;
    k.dense[NV][MR] = &dense_tile<MR, NV>;
    put_dense<NV, MR - 1>(k);
  }
}

template <int NV>
constexpr void put_winograd(Kernels& k) {
  if constexpr (NV >= 1) {
    k.winograd_product[NV] = {winograd_product<NV, winograd_places(NV)>, winograd_places(NV)};
    put_winograd<NV - 1>(k);
  }
}

// So many vectors of positions that the sums fill the registers; eight at most.
constexpr int lines_vectors(int oc) {
  const int most = (kRegisters == 32 ? 25 : 12) / oc;
  return most > kMaxLines ? kMaxLines : most;
}
template <int OC, int NX>
constexpr void put_lines(Kernels& k) {
  if constexpr (NX >= 1) {
    k.lines[OC][NX] = &lines_tile<OC, NX>;
    put_lines<OC, NX - 1>(k);
  } else if constexpr (OC > 1) {
    put_lines<OC - 1, lines_vectors(OC - 1)>(k);
  }
}

constexpr Kernels make_kernels() {
  Kernels k{};
  k.isa = ACTZIP_ISA_ID;
  k.vl = VL;
  put_sparse<kMaxNv>(k);
  if constexpr (kRegisters == 32) {
    put_pairs<12>(k);
    if constexpr (VL == 16) put_taps_pairs<4>(k);
    put_dense<1, 12>(k);
    put_dense<2, 12>(k);
    put_dense<3, 8>(k);
    put_dense<4, 6>(k);
  } else {
    put_pairs<6>(k);
    put_dense<1, 10>(k);
    put_dense<2, 6>(k);
    put_dense<3, 4>(k);
  }
  k.expanded_pairs = kExpandedPairs;
  put_winograd<kRegisters == 32 ? 8 : 6>(k);
  k.winograd[2] = {winograd_input<2>, winograd_output<2, 1>, winograd_output<2, 2>};
  k.winograd[4] = {winograd_input<4>, winograd_output<4, 1>, winograd_output<4, 2>};
  k.winograd[6] = {winograd_input<6>, winograd_output<6, 1>, winograd_output<6, 2>};
  k.lines_oc = kRegisters == 32 ? kMaxLines : 4;
  put_lines<kRegisters == 32 ? kMaxLines : 4, lines_vectors(kRegisters == 32 ? kMaxLines : 4)>(k);
  for (int oc = 1; oc <= k.lines_oc; ++oc) k.lines_nx[oc] = lines_vectors(oc);
  k.interleave3 = interleave3;
  k.lines_split = lines_split;
  k.cook_input = cook_input;
  k.cook_output = cook_output;
  k.epilogue = epilogue;
  k.depthwise = depthwise_row;
  k.compress = compress;
  k.count_values = count_values;
  k.point_values = point_values;
  k.store_values = store_values;
  k.load_values = load_values;
  k.expand = expand;
  k.peak = peak;
  return k;
}

}  // namespace

extern const Kernels kKernels;
constexpr Kernels kKernels = make_kernels();  // before any code runs: this CPU may not have the instructions

}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
