// How a kernel is launched: on its tensors' device, which must be the current one, allowed to begin early where the
// kernel's code can wait.
#pragma once

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

#ifdef __CUDACC__

namespace icon2 {
namespace cuda {

// Null where `device` is the current one, else what is wrong. The driver is asked for the device of the context that
// is current: the CUDA runtime in here is not torch's but a copy of its own, and it neither knows what torch's made
// current nor may change it.
inline const char* not_current(int device) {
  using Get = int (*)(int*);
  static const Get get = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuCtxGetDevice", &entry, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuCtxGetDevice", &entry, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<Get>(entry);
  }();
  int current = -1;
  if (get == nullptr) return "the driver does not say which device is current";
  if (get(&current) != 0) return "no device is current in this thread: call torch.cuda.set_device first";
  return current == device ? nullptr : "the tensors are not on the current device: use torch.cuda.device(...)";
}

// From sm_90 on every kernel waits (grid_wait) before it reads what another wrote, so all may be launched early.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int blocks, int blocks_y, int threads, size_t shared,
                   const Stream& stream, const Parameters&... arguments) {
  if (const char* wrong = not_current(stream.device)) return wrong;
  cudaFuncAttributes code{};
  cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  if (error == cudaSuccess && shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = &early;
    // By what the code was compiled for, not by the device: code of sm_80, which newer devices run from PTX, would not
    // wait for the kernel ahead of it.
    config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace icon2
#endif
