// The kernels for AVX2, FMA and F16C. The instruction set is chosen after the standard headers and holds to the end of
// the file.
#include "cpu/std.h"

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace icon2 {
namespace avx2_ {
#include "cpu/vec_avx2.h"
//
#include "cpu/kernels_of_isa.h"
}  // namespace avx2_
}  // namespace icon2

#ifdef __clang__
#pragma clang attribute pop
#endif

namespace icon2 {
const Kernels* avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
             ? &avx2_::kKernels
             : nullptr;
}
}  // namespace icon2

#else

namespace icon2 {
const Kernels* avx2() { return nullptr; }
}  // namespace icon2

#endif
