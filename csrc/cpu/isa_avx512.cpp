// The kernels for AVX-512 (F, BW, DQ, VL). The instruction set is chosen after the standard headers and holds to the
// end of the file.
#include "cpu/std.h"

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace icon2 {
namespace avx512_ {
#include "cpu/vec_avx512.h"
//
#include "cpu/kernels_of_isa.h"
}  // namespace avx512_
}  // namespace icon2

#ifdef __clang__
#pragma clang attribute pop
#endif

namespace icon2 {
const Kernels* avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? &avx512_::kKernels
             : nullptr;
}
}  // namespace icon2

#else

namespace icon2 {
const Kernels* avx512() { return nullptr; }
}  // namespace icon2

#endif
