// Everything that the kernels include, before an instruction set is chosen: a function of the standard library that is
// compiled for AVX-512 must not be the one that the rest of the process gets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "shared/advance.h"
#include "shared/draw.h"
#include "shared/philox.h"
#include "shared/select.h"
#include "shared/softmax.h"
#include "shared/steering.h"

// For the lambda and the short loops around an inner loop's sums, which would otherwise live in memory; and for inner
// loops of many sizes, which would spoil each other's registers in one function.
#if defined(__GNUC__) || defined(__clang__)
#define ICON2_INLINE __attribute__((always_inline))
#define ICON2_UNROLL _Pragma("GCC unroll 8")
#define ICON2_APART __attribute__((noinline))
#else
#define ICON2_INLINE
#define ICON2_UNROLL
#define ICON2_APART
#endif
