// The storage types and their conversion to and from fp32, one number at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared/host_device.h"

namespace icon2 {

enum class DType { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

ICON2_HD uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

ICON2_HD float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

ICON2_HD float to_float(float x) { return x; }

ICON2_HD float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

ICON2_HD float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | (rest & 0x3FFu) << 13);  // infinity, NaN
  if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // subnormal: units of 2⁻²⁴
  return float_of(sign | bits_of(small));
}

template <class T>
ICON2_HD T from_float(float x);

template <>
ICON2_HD float from_float<float>(float x) {
  return x;
}

template <>
ICON2_HD bf16 from_float<bf16>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>(u >> 16 | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};
}

template <>
ICON2_HD f16 from_float<f16>(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, rest = u & 0x7FFFFFFFu;
  if (rest > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (rest >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65520 and more: infinity
  if (rest < 0x38800000u) {  // below 2⁻¹⁴: adding ½ rounds to units of 2⁻²⁴
    const uint32_t units = bits_of(float_of(rest) + 0.5f) - 0x3F000000u;
    return {static_cast<uint16_t>(sign | units)};
  }
  return {static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xFFFu + (rest >> 13 & 1u)) >> 13)};
}

}  // namespace icon2
