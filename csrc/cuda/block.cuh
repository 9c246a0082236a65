// Reductions over a warp and a block, in an order that depends on the number of threads alone.
#pragma once

#include "cuda/ptx.cuh"
#include "shared/host_device.h"

namespace icon2 {
namespace cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / 32; }

// A token and how soon it comes in: the lowest time wins, then the lowest token. A time that is not a number never
// does.
struct Choice {
  double time;
  int token;
};

constexpr int kNoToken = 0x7FFFFFFF;

struct Sooner {
  __device__ Choice operator()(const Choice& a, const Choice& b) const {
    return b.time < a.time || (b.time == a.time && b.token < a.token) ? b : a;
  }
};

struct Larger {  // a NaN is passed over
  __device__ float operator()(float a, float b) const { return b > a || !(a == a) ? b : a; }
};

struct Smaller {
  __device__ float operator()(float a, float b) const { return b < a ? b : a; }
};

struct Plus {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

template <class V>
__device__ inline V from_lane_xor(V v, int mask) {
  return __shfl_xor_sync(kAllLanes, v, mask);
}
__device__ inline Choice from_lane_xor(Choice v, int mask) {
  return {__shfl_xor_sync(kAllLanes, v.time, mask), __shfl_xor_sync(kAllLanes, v.token, mask)};
}

// Over the lanes of a warp; every lane gets the result.
template <class V, class Op>
__device__ inline V over_warp(V v, Op op) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = op(v, from_lane_xor(v, mask));
  return v;
}

// Over the threads of a block; every thread gets the result. `slots`: one a warp, in shared memory.
template <class V, class Op>
__device__ inline V over_block(V v, V* slots, Op op) {
  v = over_warp(v, op);
  __syncthreads();  // the slots may still be read
  if (lane() == 0) slots[warp()] = v;
  __syncthreads();
  V all = slots[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) all = op(all, slots[w]);
  return all;
}

}  // namespace cuda
}  // namespace icon2
