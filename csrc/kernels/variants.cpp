#include "kernels/variants.h"

#include <cstring>

namespace actzip {
namespace {

const char* const kDesign = "docs/kernels.md";
const char* const kIndirect = "Dukhan, The Indirect Convolution Algorithm, arXiv:1907.02129";
const char* const kGoto = "Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008";
const char* const kLavin =
    "Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308";

}  // namespace

const std::vector<Variant>& variants(Isa isa) {
  static const std::vector<Variant> narrow = {
      {{"sparse-32", "sparse", 32, 1, kDesign}, &kSparse, 8, 64},
      {{"pair-16", "sparse", 16, 2, kDesign}, &kSparse, 4, 64},
      {{"taps-48", "sparse", 48, 1, kDesign}, &kSparseTaps, 12, 64},
      {{"dense-6x8", "dense", 8, 6, kIndirect}, &kDense, 2, 96},
      {{"lines-4x12", "dense", 4, 12, kDesign}, &kLines, 1, 12},
      {{"winograd-4x4", "winograd", 24, 16, kLavin}, &kWinograd, 6, 56},
      {{"winograd-6x6", "winograd", 24, 36, kLavin}, &kWinograd, 6, 56},
      {{"winograd-2x2", "winograd", 24, 4, kLavin}, &kWinograd, 6, 98},
      {{"cook-toom-4", "dense", 8, 4, kLavin}, &kCookToom, 2, 48},
      {{"depthwise", "depthwise", 4, 1, kDesign}, &kDepthwise, 1, 1},
  };
  static const std::vector<Variant> neon = {
      {{"sparse-48", "sparse", 48, 1, kDesign}, &kSparse, 12, 64},
      {{"sparse-32", "sparse", 32, 1, kDesign}, &kSparse, 8, 64},
      {{"pair-32", "sparse", 32, 2, kDesign}, &kSparse, 8, 64},
      {{"taps-48", "sparse", 48, 1, kDesign}, &kSparseTaps, 12, 64},
      {{"dense-6x16", "dense", 16, 6, kIndirect}, &kDense, 4, 96},
      {{"lines-8x12", "dense", 8, 12, kDesign}, &kLines, 1, 12},
      {{"winograd-4x4", "winograd", 32, 16, kLavin}, &kWinograd, 8, 56},
      {{"winograd-6x6", "winograd", 32, 36, kLavin}, &kWinograd, 8, 56},
      {{"winograd-2x2", "winograd", 32, 4, kLavin}, &kWinograd, 8, 98},
      {{"cook-toom-4", "dense", 16, 4, kLavin}, &kCookToom, 4, 48},
      {{"depthwise", "depthwise", 4, 1, kDesign}, &kDepthwise, 1, 1},
  };
  static const std::vector<Variant> avx2 = {
      {{"sparse-64", "sparse", 64, 1, kDesign}, &kSparse, 8, 64},
      {{"sparse-96", "sparse", 96, 1, kDesign}, &kSparse, 12, 64},
      {{"sparse-32", "sparse", 32, 1, kDesign}, &kSparse, 4, 96},
      {{"pair-32", "sparse", 32, 2, kDesign}, &kSparse, 4, 96},
      {{"pair-48", "sparse", 48, 2, kDesign}, &kSparse, 6, 64},
      {{"row-64", "sparse", 64, 1, kDesign}, &kSparseRow, 8, 64},
      {{"row-96", "sparse", 96, 1, kDesign}, &kSparseRow, 12, 64},
      {{"taps-96", "sparse", 96, 1, kDesign}, &kSparseTaps, 12, 64},
      {{"dense-6x16", "dense", 16, 6, kIndirect}, &kDense, 2, 96},
      {{"dense-4x24", "dense", 24, 4, kGoto}, &kDense, 3, 96},
      {{"lines-4x24", "dense", 4, 24, kDesign}, &kLines, 1, 24},
      {{"winograd-4x4", "winograd", 48, 16, kLavin}, &kWinograd, 6, 56},
      {{"winograd-6x6", "winograd", 48, 36, kLavin}, &kWinograd, 6, 56},
      {{"winograd-2x2", "winograd", 48, 4, kLavin}, &kWinograd, 6, 98},
      {{"cook-toom-4", "dense", 16, 4, kLavin}, &kCookToom, 2, 48},
      {{"depthwise", "depthwise", 8, 1, kDesign}, &kDepthwise, 1, 1},
  };
  static const std::vector<Variant> avx512 = {
      {{"sparse-64", "sparse", 64, 1, kDesign}, &kSparse, 4, 64},
      {{"sparse-128", "sparse", 128, 1, kDesign}, &kSparse, 8, 64},
      {{"pair-64", "sparse", 64, 2, kDesign}, &kSparse, 4, 64},
      {{"pair-128", "sparse", 128, 2, kDesign}, &kSparse, 8, 64},
      {{"pair-192", "sparse", 192, 2, kDesign}, &kSparse, 12, 64},
      {{"row-128", "sparse", 128, 1, kDesign}, &kSparseRow, 8, 64},
      {{"taps-192", "sparse", 192, 1, kDesign}, &kSparseTaps, 12, 64},
      {{"taps-pair-192", "sparse", 192, 2, kDesign}, &kSparseTaps, 12, 64},
      {{"dense-6x64", "dense", 64, 6, kIndirect}, &kDense, 4, 96},
      {{"dense-8x48", "dense", 48, 8, kIndirect}, &kDense, 3, 96},
      {{"dense-12x32", "dense", 32, 12, kIndirect}, &kDense, 2, 96},
      {{"lines-8x48", "dense", 8, 48, kDesign}, &kLines, 1, 48},
      {{"winograd-4x4", "winograd", 128, 16, kLavin}, &kWinograd, 8, 56},
      {{"winograd-6x6", "winograd", 128, 36, kLavin}, &kWinograd, 8, 56},
      {{"winograd-2x2", "winograd", 128, 4, kLavin}, &kWinograd, 8, 98},
      {{"cook-toom-4", "dense", 48, 4, kLavin}, &kCookToom, 3, 48},
      {{"depthwise", "depthwise", 16, 1, kDesign}, &kDepthwise, 1, 1},
  };
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
    case Isa::avx512_icl:
      return avx512;
    case Isa::neon:
      return neon;
    default:
      return narrow;
  }
}

bool computes(const Variant& v, const ConvProblem& p) {
  return (p.pool == 1 || v.family == &kWinograd) && v.family->can(v, p);
}

const std::vector<KernelRow>& kernel_table(Isa isa) {
  static const std::vector<std::vector<KernelRow>> tables = [] {
    std::vector<std::vector<KernelRow>> all(kIsaCount);
    for (int i = 0; i < kIsaCount; ++i)
      for (const Variant& v : variants(static_cast<Isa>(i))) all[static_cast<size_t>(i)].push_back(v.row);
    return all;
  }();
  return tables[static_cast<size_t>(isa)];
}

std::vector<std::string> conv_variants(const ConvProblem& p) {
  p.check();
  std::vector<std::string> names;
  // Which first: depthwise, else sparse below the usual break-even density, else dense; within a kind in
  // table order.
  const bool depthwise = is_depthwise(p), sparse_first = p.hint_density < 0.75;
  for (const bool pass : {true, false})
    for (const Variant& v : variants(active_isa())) {
      if (!computes(v, p)) continue;
      const bool early =
          depthwise ? v.family == &kDepthwise : (std::strcmp(v.row.kind, "sparse") == 0) == sparse_first;
      if (early == pass) names.emplace_back(v.row.name);
    }
  return names;
}

}  // namespace actzip
