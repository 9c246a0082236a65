// What follows from a row's token: the state that the next step begins with.
#pragma once

#include "cpu/kernels.h"
#include "shared/host_device.h"

namespace icon2 {

ICON2_HD void advance(const Sample& a, int64_t row, int64_t token, double logprob) {
  a.tokens[row] = token;
  a.logprobs[row] = static_cast<float>(logprob);
  a.positions[row] += 1;
  a.generated[row] += 1;
  if (a.seen != nullptr) a.seen[row * a.vocab + token] = true;
  bool ends = a.generated[row] >= a.budget[row];
  for (int64_t e = 0; e < a.eos_width; ++e) ends |= a.eos[row * a.eos_width + e] == token;
  a.running[row] = !ends;
}

}  // namespace icon2
