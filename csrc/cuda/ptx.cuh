// What the kernels use of the machine beyond CUDA C++: asynchronous copies, tensor cores, dependent launches. All PTX
// is here; without nvcc the same names come from the emulator of csrc/test, in which the kernels run on a CPU.
#pragma once

#include <cstdint>

#include "cpu/scalar.h"

#ifndef __CUDACC__
#include "test/emulate.h"
#else
#include <cuda_runtime.h>

namespace icon2 {

// The block's dynamic shared memory as a struct.
template <class S>
__device__ __forceinline__ S& shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return *reinterpret_cast<S*>(memory);
}

// 16 bytes from global to shared memory, both aligned to 16; of `bytes` < 16 the rest becomes zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

// Closes the group of the copies since the last one.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `left` of this thread's groups are under way.
template <int left>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8]: mma.m16n8k16, the fragments as the PTX manual has them.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// What other blocks have written: past this multiprocessor's own cache.
__device__ __forceinline__ float load_fresh(const float* from) { return __ldcg(from); }

// Until here a kernel may run before the one ahead of it in the stream has ended: it reads nothing that others write.
__device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel may begin, up to its own grid_wait.
__device__ __forceinline__ void grid_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace icon2
#endif
