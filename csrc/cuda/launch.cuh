// How a kernel is launched: on its tensors' device, allowed to begin early where the device can do that.
#pragma once

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

#ifdef __CUDACC__

namespace icon2 {
namespace cuda {

// The device of the tensors is current while this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Every kernel waits (grid_wait) before it reads what another wrote, so all may be launched early.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int blocks, int blocks_y, int threads, size_t shared,
                   const Stream& stream, const Parameters&... arguments) {
  const OnDevice on(stream.device);
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, stream.device);
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
    config.numAttrs = major >= 9 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace icon2
#endif
