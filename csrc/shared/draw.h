// A row's choice as far as it is arithmetic: the repetition penalty, and the race of exponential draws.
#pragma once

#include <cmath>
#include <cstdint>

#include "shared/host_device.h"
#include "shared/philox.h"

namespace icon2 {

ICON2_HD float penalised(float score, float penalty) { return score < 0.0f ? score * penalty : score / penalty; }

// The race argmin(E / p), E = −log1p(−u), by logarithms: argmin(log E − score) knows no maximum and no sum, so a part
// of the vocabulary can be run by itself.
ICON2_HD double race_time(uint32_t word, float score) {
  return std::log(-std::log1p(-uniform(word))) - static_cast<double>(score);
}

// What the two bounds below may be off by, whichever logarithm computes them.
ICON2_HD float race_margin(float time) { return 1e-4f + 4e-6f * std::fabs(time); }

// Not above race_time, by one logarithm, as −log1p(−u) ≥ u. Not a number for a token that cannot win (score −inf).
ICON2_HD float race_floor(uint32_t word, float score) {
  const float u = uniform_nearly(word);
#ifdef __CUDA_ARCH__
  const float time = __logf(u) - score;
#else
  const float time = std::log(u) - score;
#endif
  return time - race_margin(time);
}

// Not below race_time. Where u is so close to 1 that fp32 cannot tell, nothing is said.
ICON2_HD float race_ceiling(uint32_t word, float score) {
  const float u = uniform_nearly(word);
  if (!(u < 0.999f) || !(u > 0.0f)) return INFINITY;
  const float time = std::log(-std::log1p(-u)) - score;
  return time + race_margin(time);
}

}  // namespace icon2
