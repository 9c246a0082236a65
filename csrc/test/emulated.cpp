// The CUDA kernels on the emulator behind a C interface, for tests/test_native_cuda.py (ctypes).
#include <algorithm>

#include "cuda/kernels.h"
#include "test/emulate.h"

namespace icon2 {
namespace cuda {
const char* why_not(int) { return nullptr; }
}  // namespace cuda
}  // namespace icon2

using namespace icon2;

extern "C" {

int64_t emulated_sample_scratch(int64_t rows, int64_t vocab) { return cuda::sample_scratch(rows, vocab); }
int64_t emulated_linear_scratch() { return cuda::kLinearScratch; }

// `p`: in the order of the struct Sample, then the scratch.
void emulated_sample(int64_t rows, int64_t vocab, int64_t eos_width, int dtype, int64_t stride, void** p) {
  const Sample a{rows,
                 vocab,
                 eos_width,
                 static_cast<DType>(dtype),
                 p[0],
                 stride,
                 static_cast<bool*>(p[1]),
                 static_cast<int64_t*>(p[2]),
                 static_cast<float*>(p[3]),
                 static_cast<int32_t*>(p[4]),
                 static_cast<float*>(p[5]),
                 static_cast<float*>(p[6]),
                 static_cast<float*>(p[7]),
                 static_cast<bool*>(p[8]),
                 static_cast<int32_t*>(p[9]),
                 static_cast<int32_t*>(p[10]),
                 static_cast<int32_t*>(p[11]),
                 static_cast<int64_t*>(p[12]),
                 static_cast<int32_t*>(p[13]),
                 static_cast<int32_t*>(p[14]),
                 static_cast<bool*>(p[15]),
                 static_cast<float*>(p[16])};
  cuda::sample(a, p[17], {});
}

// `p`: x, weight, bias, y, residual, scratch.
void emulated_linear(int64_t rows, int64_t in, int64_t out, int dtype, int64_t stride, void** p) {
  const Linear a{rows, in, out, static_cast<DType>(dtype), p[0], p[1], p[2], stride, p[3]};
  cuda::linear({a, p[4], p[5]}, {});
}
}
