// Which instruction set runs, and how to see and force it.
//
// Every algorithm of the core is written once in a `*.inl.h` file and compiled once per `Isa` by the thin
// files in `<area>/isa/<isa>.cpp`, inside `namespace ACTZIP_ISA_NS`. A dispatch table per area maps
// `active_isa()` to the functions. Rules for code in `*.inl.h`: everything inside `ACTZIP_ISA_NS` (or an
// anonymous namespace), and no non-trivial inline function or template of the standard library: the
// linker keeps one copy of those and it might be one compiled for a newer CPU.
#pragma once

#include <string>
#include <vector>

namespace actzip {

// Ordered: a larger x86 value includes the smaller ones.
enum class Isa : int {
  baseline = 0,    // the platform's own floor (x86-64: SSE2), plain C++
  avx2 = 1,        // AVX2, FMA, F16C, BMI1/2, LZCNT, POPCNT
  avx512 = 2,      // + AVX-512 F, BW, DQ, VL, CD (Skylake-X and later)
  avx512_icl = 3,  // + VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ, IFMA, VPCLMULQDQ (Ice Lake, Zen 4)
  neon = 4,        // AArch64 Advanced SIMD
};
inline constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// The instruction sets that this CPU (and operating system) can run, `baseline` first, best last.
const std::vector<Isa>& supported_isas();

// The one in use: the best supported, or the one forced. The environment variable ACTZIP_ISA (a name of
// the enum) forces it at load; a name that is unknown or not supported here is ignored and reported by
// `isa_warning()`.
Isa active_isa();

// Forces `name` from now on in this module; an empty string goes back to the best one. Returns false and
// changes nothing when the name is unknown or the CPU cannot run it. Safe from any thread; calls that are
// already running finish on the old set.
bool force_isa(const std::string& name);

// Empty, or what was wrong with ACTZIP_ISA.
const std::string& isa_warning();

// "AMD EPYC ...", empty where it cannot be read.
std::string cpu_model();

// Features beyond the ladder above that change advice: "amx_bf16", "amx_int8", "avx512_bf16",
// "avx512_vnni", "avx_vnni", "avx512_fp16" as far as the CPU has them.
std::vector<std::string> cpu_extras();

}  // namespace actzip
