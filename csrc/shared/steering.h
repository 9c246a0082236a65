// The steering law, h ← h + Σ (α + β·⟨h, u⟩)·u, as far as it is scalar: what every kernel that steers agrees on.
#pragma once

#include "shared/host_device.h"

namespace icon2 {

// What one term adds along its unit vector; `dot` is ⟨h, u⟩ before any term is added, 0 where β is 0.
ICON2_HD float coefficient(float alpha, float beta, float dot) { return alpha + beta * dot; }

// The factor by which keep_norm brings a steered state back to its norm: none where either norm is 0.
ICON2_HD float keep_norm_scale(float before, float after) {
  return before > 0.0f && after > 0.0f ? before / after : 1.0f;
}

}  // namespace icon2
