// What follows from the rows' positions before any block runs. Too little work for threads or vectors.
#pragma once

#include "cpu/kernels.h"

namespace icon2 {

struct BeginStep {
  int64_t rows, table_stride, page_size, half, n, width, rows_stride,
      used;  // half of a head; n items, `used` of them in use
  DType dtype;
  const int32_t *positions, *tables;
  const bool* running;
  const float* inv_freq;
  float rope_scaling;
  const int32_t *item_rows, *splits;
  int64_t split;
  int32_t *lengths, *n_splits;
  int64_t* slots;
  void *cos, *sin;
};

void begin_step(const BeginStep& a);

}  // namespace icon2
