#include "cpu/begin_step.h"

#include <cmath>

namespace icon2 {
namespace {

template <class T>
void rotary(const BeginStep& a) {
  const int64_t d = 2 * a.half;
  for (int64_t row = 0; row < a.rows; ++row) {
    T *cos = static_cast<T*>(a.cos) + row * d, *sin = static_cast<T*>(a.sin) + row * d;
    for (int64_t i = 0; i < a.half; ++i) {
      const float angle = static_cast<float>(a.positions[row]) * a.inv_freq[i];
      const float c = std::cos(angle) * a.rope_scaling, s = std::sin(angle) * a.rope_scaling;
      cos[i] = cos[i + a.half] = from_float<T>(c);
      sin[i] = from_float<T>(-s);
      sin[i + a.half] = from_float<T>(s);
    }
  }
}

}  // namespace

void begin_step(const BeginStep& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t position = a.positions[row], page = position / a.page_size;
    a.slots[row] =
        a.running[row] ? a.tables[row * a.table_stride + page] * a.page_size + position % a.page_size : int64_t{-1};
    a.n_splits[row] = a.running[row] ? static_cast<int32_t>(position / a.split + 1) : 0;
  }
  for (int64_t item = a.used; item < a.n; ++item) a.lengths[item] = 0;
  for (int64_t item = 0; item < a.used; ++item) {
    const int32_t* rows = a.item_rows + item * a.rows_stride;
    bool wanted = false;
    for (int64_t i = 0; i < a.width; ++i) wanted |= rows[i] >= 0 && a.running[rows[i]];
    const int64_t first = rows[0] < 0 ? 0 : rows[0];
    int64_t length = a.positions[first] + 1 - a.splits[item] * a.split;
    length = length < 0 ? 0 : length > a.split ? a.split : length;
    a.lengths[item] = wanted ? static_cast<int32_t>(length) : 0;
  }
  a.dtype == DType::f32 ? rotary<float>(a) : a.dtype == DType::bf16 ? rotary<bf16>(a) : rotary<f16>(a);
}

}  // namespace icon2
