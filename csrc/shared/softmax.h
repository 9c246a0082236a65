// The merge of a softmax that was computed in parts: each part has its largest score m and l = Σ exp(score − m).
#pragma once

#include "shared/host_device.h"

namespace icon2 {

struct SoftmaxPart {
  float m;  // -inf for a part without any position
  float l;  // 0 for a part without any position
};

// What a part counts beside one whose largest score is `most`. Both sides are guarded: an empty part counts 0, also
// where every part is empty and −inf − (−inf) would be NaN. `exp` is handed in: host and device have their own.
template <class Exp>
ICON2_HD float part_weight(const SoftmaxPart& part, float most, Exp exp) {
  return part.l > 0.0f ? exp(part.m - most) : 0.0f;
}

// 1/l of the merged softmax, 0 where there was no position at all.
ICON2_HD float inverse_mass(float l) { return l > 0.0f ? 1.0f / l : 0.0f; }

}  // namespace icon2
