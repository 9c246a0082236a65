// As much of DLPack 1's C exchange interface as is used here: how torch lends a tensor's pointer, sizes and strides to
// C, without libtorch and without a call into Python (torch.Tensor.__dlpack_c_exchange_api__; the layout is DLPack's).
#pragma once

#include <cstdint>

namespace icon2 {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // borrowed from the tensor; strides in elements
  uint64_t byte_offset;
};

constexpr int32_t kDLCPU = 1, kDLCUDA = 2;
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6;

struct DLExchange {
  uint32_t major, minor;
  void* previous;
  int (*allocate)(DLTensor*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*view)(void* object, DLTensor* out);  // may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace icon2
