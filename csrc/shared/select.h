// The sampler's selection: thresholds for top_k and top_p without sorting, by radix.
//
// Scores become unsigned keys of the same order. A pass looks at eight bits of the key, from the highest down, and adds
// up what lies in each of the 256 bins (a count for top_k, a mass for top_p) among the keys whose higher bits are
// already decided; `pick_*` finds the bin in which the threshold lies, and four passes decide the whole key. Masses are
// fixed-point integers, so their sum is the same in any order.
#pragma once

#include <cstdint>

#include "shared/host_device.h"

namespace icon2 {

constexpr int kBins = 256;
constexpr int kPasses = 4;

// The bits of a score as an unsigned integer of the same order; both zeros have one key, as they are equal.
ICON2_HD uint32_t ordered_key(uint32_t bits) {
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

ICON2_HD uint32_t key_bits(uint32_t key) { return key & 0x80000000u ? key & 0x7FFFFFFFu : ~key; }

ICON2_HD int digit(uint32_t key, int pass) { return static_cast<int>(key >> (24 - 8 * pass)) & 0xFF; }

// Are the bits above this pass's digit those that were decided before?
ICON2_HD bool decided(uint32_t key, uint32_t prefix, int pass) {
  return pass == 0 || key >> (32 - 8 * pass) == prefix >> (32 - 8 * pass);
}

// A weight in [0, 1], relative to the largest, in units of 2⁻⁴⁰: 2²³ of them fit in 64 bits. A NaN has none.
ICON2_HD uint64_t fixed_mass(float weight) {
  return weight > 0.0f ? static_cast<uint64_t>(weight * 1099511627776.0f) : 0;
}

// How many passes decide the key of an fp32 score that was converted from a type with so many bits below its sign that
// may differ, and what the key is once they have: the bits that are left are all zero in the score.
ICON2_HD int passes_for(int significant_bits) { return (significant_bits + 7) / 8; }

ICON2_HD uint32_t completed(uint32_t prefix, int passes) {
  const uint32_t open = passes < kPasses ? 0xFFFFFFFFu >> (8 * passes) : 0;
  return prefix & 0x80000000u ? prefix : prefix | open;
}

struct Pick {
  int bin;
  uint64_t rest;  // what is left to find inside the bin
};

// top_k: from the largest down, the bin of `n` that holds the rest-th entry (rest ≥ 1).
ICON2_HD Pick pick_from_top(const uint64_t* bins, uint64_t rest, int n = kBins) {
  for (int bin = n - 1; bin > 0; --bin) {
    if (bins[bin] >= rest) return {bin, rest};
    rest -= bins[bin];
  }
  return {0, rest};
}

// top_p: from the smallest up, the first bin at which the mass so far exceeds `rest`. Where none does (p = 0), the
// highest that is not empty.
ICON2_HD Pick pick_from_bottom(const uint64_t* bins, uint64_t rest, int n = kBins) {
  int last = 0;
  uint64_t before_last = rest;
  for (int bin = 0; bin < n; ++bin) {
    if (bins[bin] == 0) continue;
    if (bins[bin] > rest) return {bin, rest};
    last = bin;
    before_last = rest;
    rest -= bins[bin];
  }
  return {last, before_last};
}

// The mass that top_p may drop: what is at most 1 − p of all of it, with 1 − p taken in fp32 as the reference does.
ICON2_HD uint64_t droppable(uint64_t total, float p) {
  return static_cast<uint64_t>(static_cast<double>(1.0f - p) * static_cast<double>(total));
}

}  // namespace icon2
