// What lets one header be compiled for the host and, by nvcc, for the device.
#pragma once

#ifdef __CUDACC__
#define ICON2_HD __host__ __device__ __forceinline__
#else
#define ICON2_HD inline
#endif
