// x Wᵀ (+ b) for the few rows of a decode step: W is read once, by all rows together.
//
// Every result is one sum of W-wide partial sums in the order of the inputs, whatever the tile it was computed in: a
// row's result does not depend on the other rows, nor on how many there are.

// R rows of x times O rows of the weight.
template <class T, int R, int O>
static inline void linear_tile(const T* x, int64_t x_stride, const T* weight, const T* bias, int64_t in, T* y,
                               int64_t y_stride) {
  float total[R * O];
  dots<R, O>([&](int r) { return x + r * x_stride; }, [&](int o) { return weight + o * in; }, in, total);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      y[r * y_stride + o] = from_float<T>(total[r * O + o] + (bias == nullptr ? 0.0f : to_float(bias[o])));
}

// All rows times O rows of the weight, which stay in the cache after the first tile; R rows at once, or what is left.
template <class T, int R, int O>
static inline void linear_rows(const Linear& a, int64_t o) {
  const T* weight = static_cast<const T*>(a.weight) + o * a.in;
  const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + o;
  const auto tile = [&](auto rows, int64_t r) {
    linear_tile<T, decltype(rows)::value, O>(static_cast<const T*>(a.x) + r * a.x_stride, a.x_stride, weight, bias,
                                             a.in, static_cast<T*>(a.y) + r * a.out + o, a.out);
  };
  int64_t r = 0;
  for (; r + R <= a.rows; r += R) tile(std::integral_constant<int, R>(), r);
  if constexpr (R == 4) {
    if (a.rows - r == 3) tile(std::integral_constant<int, 3>(), r);
    if (a.rows - r == 2) tile(std::integral_constant<int, 2>(), r);
    if (a.rows - r == 1) tile(std::integral_constant<int, 1>(), r);
  }
}

template <class T, int R, int O>
static void linear_of(const Linear& a) {
  parallel_for((a.out + O - 1) / O, O * a.in * (a.rows + 1) / 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t o = tile * O;
      if (o + O <= a.out) {
        linear_rows<T, R, O>(a, o);
      } else {
        for (; o < a.out; ++o) linear_rows<T, R, 1>(a, o);
      }
    }
  });
}

// As many sums at once as hide the latency of a multiply-add and fit the registers.
template <class T>
static void linear_by_rows(const Linear& a) {
  if (a.rows == 1) {
    linear_of<T, 1, 8>(a);
  } else if (a.rows == 2) {
    linear_of<T, 2, 4>(a);
  } else {
    linear_of<T, 4, 2>(a);
  }
}

static void linear(const Linear& a) {
  a.dtype == DType::f32    ? linear_by_rows<float>(a)
  : a.dtype == DType::bf16 ? linear_by_rows<bf16>(a)
                           : linear_by_rows<f16>(a);
}
