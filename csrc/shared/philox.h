// Philox4x32-10 (Salmon et al., SC 2011): the words behind every random choice, equal on every backend.
#pragma once

#include <cstdint>

#include "shared/host_device.h"

namespace icon2 {

struct Words {
  uint32_t x[4];
};

ICON2_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// The uniform draw of a word, in (0, 1): exact in double.
ICON2_HD double uniform(uint32_t word) { return (static_cast<double>(word) + 0.5) * 2.3283064365386963e-10; }

// The same in fp32, without the half and so not above it but for rounding: enough to dismiss a draw.
ICON2_HD float uniform_nearly(uint32_t word) { return static_cast<float>(word) * 2.3283064e-10f; }

// The words of tokens 4·block … 4·block + 3 for the index-th generated token of a row.
ICON2_HD Words token_words(uint32_t block, uint32_t index, uint32_t seed_low, uint32_t seed_high) {
  return philox(block, index, 0, 0, seed_low, seed_high);
}

}  // namespace icon2
