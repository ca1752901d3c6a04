// The pybind11 module `tscnc_kernels._C`: what the binary is, and which CPU kernels run. No tensors
// here: the ops register themselves with torch when this library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_config.h"
#include "cpu/isa.h"
#include "cpu/masked_linear_bf16.h"

namespace tscnc {
namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

// Instruction sets from the least to the most; all but `wide` contain those before them.
struct Level {
  const char* name;
  Isa isa;
  bool bf16_dots;
};
constexpr Level kLevels[] = {{"portable", Isa::portable, false},
                             {"wide", Isa::wide, true},
                             {"avx2", Isa::avx2, false},
                             {"avx512", Isa::avx512, false},
                             {"avx512_bf16", Isa::avx512, true}};
enum : int { kPortable, kWide, kAvx2, kAvx512, kAvx512Bf16, kLevelCount };

int best_level() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (!avx2) return kPortable;
#if !defined(TSCNC_EMULATE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  }
#endif
  return kAvx2;
#else
  return kPortable;
#endif
}

bool runs_here(int level) { return level == kWide ? best_level() >= kAvx2 : level <= best_level(); }

int parse_level(const std::string& name) {
  const std::vector<std::string> compiled = words(TSCNC_CPU_ISAS);
  for (int level = 0; level < kLevelCount; ++level) {
    if (name != kLevels[level].name) continue;
    if (std::find(compiled.begin(), compiled.end(), name) == compiled.end()) break;
    if (runs_here(level)) return level;
    throw std::runtime_error("TSCNC_ISA: this CPU does not run '" + name + "', its best is '" +
                             kLevels[best_level()].name + "'");
  }
  throw std::runtime_error(std::string("TSCNC_ISA: expected one of ") + TSCNC_CPU_ISAS + ", got '" +
                           name + "'");
}

std::atomic<int> g_level{kPortable};

const Level& active_level() { return kLevels[g_level.load(std::memory_order_relaxed)]; }

void set_isa(const std::string& name) {
  g_level.store(name.empty() ? best_level() : parse_level(name));
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
#define TSCNC_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name)
  TSCNC_FEATURE("avx2");
  TSCNC_FEATURE("fma");
  TSCNC_FEATURE("f16c");
  TSCNC_FEATURE("bmi2");
  TSCNC_FEATURE("avx512f");
  TSCNC_FEATURE("avx512bw");
  TSCNC_FEATURE("avx512dq");
  TSCNC_FEATURE("avx512vl");
  TSCNC_FEATURE("avx512bf16");
#undef TSCNC_FEATURE
#endif
  return found;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = TSCNC_VERSION;
  info["source_digest"] = TSCNC_SOURCE_DIGEST;
  info["cpu_isas"] = words(TSCNC_CPU_ISAS);
  const std::vector<std::string> archs = words(TSCNC_CUDA_ARCHS);
  info["cuda_archs"] = archs.empty() ? pybind11::object(pybind11::none()) : pybind11::cast(archs);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch_stable_abi"] = "2.11";
  info["cpu_features"] = cpu_features();
  return info;
}

}  // namespace

Isa active_isa() { return active_level().isa; }

bool has_bf16_dots() { return active_level().bf16_dots; }

}  // namespace tscnc

PYBIND11_MODULE(_C, module) {
  const char* forced = std::getenv("TSCNC_ISA");
  tscnc::set_isa(forced ? forced : "");
  module.def("build_info", &tscnc::build_info,
             "What this binary was built from and for, and what this CPU offers it.");
  module.def("set_isa", &tscnc::set_isa, pybind11::arg("name"),
             "Run the CPU kernels of this instruction set; an empty name means the best one.");
  module.def(
      "active_isa", [] { return std::string(tscnc::active_level().name); },
      "The instruction set whose CPU kernels run.");
}
