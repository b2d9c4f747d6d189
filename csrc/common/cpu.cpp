#include "common/cpu.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>

#if defined(__x86_64__) || defined(_M_X64)
#define ACTZIP_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace actzip {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_icl", "neon"};

#ifdef ACTZIP_X86
struct Regs {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Regs cpuid(uint32_t leaf, uint32_t sub = 0) {
  Regs r;
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(sub));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]),
       static_cast<uint32_t>(v[3])};
#else
  __cpuid_count(leaf, sub, r.a, r.b, r.c, r.d);
#endif
  return r;
}

uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
#endif
}

bool bit(uint32_t reg, int n) { return (reg >> n) & 1u; }

struct X86 {
  bool avx2 = false, avx512 = false, icl = false;
  std::vector<std::string> extras;

  X86() {
    const uint32_t max_leaf = cpuid(0).a;
    if (max_leaf < 7) return;
    const Regs l1 = cpuid(1);
    const Regs l7 = cpuid(7);
    const Regs l71 = l7.a >= 1 ? cpuid(7, 1) : Regs{};
    const Regs ext = cpuid(0x80000000u).a >= 0x80000001u ? cpuid(0x80000001u) : Regs{};
    const bool osxsave = bit(l1.c, 27);
    const uint64_t os = osxsave ? xcr0() : 0;
    const bool ymm = (os & 0x6) == 0x6;
    const bool zmm = ymm && (os & 0xe0) == 0xe0;
    const bool tiles = (os & 0x60000) == 0x60000;
    avx2 = ymm && bit(l1.c, 28) && bit(l1.c, 12) && bit(l1.c, 29) && bit(l1.c, 23) && bit(l7.b, 5) &&
           bit(l7.b, 3) && bit(l7.b, 8) && bit(ext.c, 5);
    avx512 = avx2 && zmm && bit(l7.b, 16) && bit(l7.b, 17) && bit(l7.b, 28) && bit(l7.b, 30) && bit(l7.b, 31);
    icl = avx512 && bit(l7.b, 21) && bit(l7.c, 1) && bit(l7.c, 6) && bit(l7.c, 11) && bit(l7.c, 12) &&
          bit(l7.c, 14) && bit(l7.c, 10) && bit(l1.c, 1);
    if (zmm && bit(l7.c, 11)) extras.push_back("avx512_vnni");
    if (ymm && bit(l71.a, 4)) extras.push_back("avx_vnni");
    if (zmm && bit(l71.a, 5)) extras.push_back("avx512_bf16");
    if (zmm && bit(l7.d, 23)) extras.push_back("avx512_fp16");
    if (tiles && bit(l7.d, 24) && bit(l7.d, 22)) extras.push_back("amx_bf16");
    if (tiles && bit(l7.d, 24) && bit(l7.d, 25)) extras.push_back("amx_int8");
  }
};

const X86& x86() {
  static const X86 x;
  return x;
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> v{Isa::baseline};
#ifdef ACTZIP_X86
  if (x86().avx2) v.push_back(Isa::avx2);
  if (x86().avx512) v.push_back(Isa::avx512);
  if (x86().icl) v.push_back(Isa::avx512_icl);
#elif defined(__aarch64__) || defined(_M_ARM64)
  v.push_back(Isa::neon);
#endif
  return v;
}

bool find(const std::string& name, Isa* out) {
  for (Isa isa : supported_isas())
    if (name == isa_name(isa)) {
      *out = isa;
      return true;
    }
  return false;
}

struct State {
  std::atomic<int> active;
  std::string warning;

  State() : active(static_cast<int>(supported_isas().back())) {
    const char* env = std::getenv("ACTZIP_ISA");
    if (env == nullptr || *env == '\0') return;
    Isa isa;
    if (find(env, &isa)) {
      active = static_cast<int>(isa);
      return;
    }
    warning = std::string("ACTZIP_ISA=") + env + " is not an instruction set of this CPU; these are:";
    for (Isa s : supported_isas()) warning += std::string(" ") + isa_name(s);
  }
};

State& state() {
  static State s;
  return s;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> v = detect();
  return v;
}

Isa active_isa() { return static_cast<Isa>(state().active.load(std::memory_order_relaxed)); }

bool force_isa(const std::string& name) {
  Isa isa = supported_isas().back();
  if (!name.empty() && !find(name, &isa)) return false;
  state().active = static_cast<int>(isa);
  return true;
}

const std::string& isa_warning() { return state().warning; }

std::string cpu_model() {
#ifdef ACTZIP_X86
  if (cpuid(0x80000000u).a >= 0x80000004u) {
    char brand[49] = {};
    for (uint32_t i = 0; i < 3; ++i) {
      const Regs r = cpuid(0x80000002u + i);
      const uint32_t v[4] = {r.a, r.b, r.c, r.d};
      std::memcpy(brand + 16 * i, v, 16);
    }
    std::string s(brand);
    const size_t first = s.find_first_not_of(' ');
    const size_t last = s.find_last_not_of(" ");
    return first == std::string::npos ? "" : s.substr(first, last - first + 1);
  }
#endif
  std::ifstream f("/proc/cpuinfo");
  for (std::string line; std::getline(f, line);) {
    for (const char* key : {"model name", "CPU part", "Hardware"})
      if (line.rfind(key, 0) == 0) {
        const size_t colon = line.find(':');
        if (colon != std::string::npos && colon + 2 <= line.size()) return line.substr(colon + 2);
      }
  }
  return "";
}

std::vector<std::string> cpu_extras() {
#ifdef ACTZIP_X86
  return x86().extras;
#else
  return {};
#endif
}

}  // namespace actzip
