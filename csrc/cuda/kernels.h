// The CUDA kernels' launchers. Arguments are as those of the CPU kernels, with pointers to the device's memory, and
// have been checked (bind_cuda.cpp). A launcher enqueues, and neither allocates nor waits, so that it can be captured
// in a graph. It returns null, or what went wrong in words.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

namespace icon2 {
namespace cuda {

struct Stream {
  int device;
  void* handle;
};

// ops.sample. `scratch`: sample_scratch(rows, vocab) bytes at a multiple of 16, whatever they hold.
constexpr int64_t kMostVocab = int64_t{1} << 20;
int64_t sample_scratch(int64_t rows, int64_t vocab);
const char* sample(const Sample& a, void* scratch, const Stream& stream);

// ops.linear for 1 to 16 rows, bf16 and fp16; y = x Wᵀ + bias + residual, one rounding. A row of x and of the weight
// begins at a multiple of 16 bytes.
constexpr int64_t kMostRows = 16;
struct SkinnyLinear {
  Linear a;
  const void* residual;  // [rows, out], dense, or null
  // kLinearScratch bytes at a multiple of 16; zero before the first use, and left so that the next product of the
  // stream can use it, whatever its sizes.
  void* scratch;
};
constexpr int kMostParts = 256;  // blocks that leave partial sums: a counter and 16 × 64 sums each
constexpr int64_t kLinearScratch = int64_t{4} * kMostParts * (1 + kMostRows * 64);
const char* linear(const SkinnyLinear& a, const Stream& stream);

// Null where the kernels can run on this device, else why not.
const char* why_not(int device);

}  // namespace cuda
}  // namespace icon2
