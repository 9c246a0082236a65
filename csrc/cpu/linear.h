// x · weightᵀ (+ bias) for the few rows of a decode step: the weight comes from memory once and in order, for all rows.
//
// Every result is one sum of W partial sums in the order of the inputs, whatever the tile it was computed in: a row's
// result does not depend on the other rows, nor on how many there are (but for which NaN a NaN is).

template <class T>
static inline const T* weight_row(const Linear& a, int64_t o) {
  return static_cast<const T*>(a.weight) + o * a.in;
}

// The outputs o … o + n − 1 of a row.
template <class T>
static inline void finish(const Linear& a, int64_t row, int64_t o, int n, const float* total) {
  T* y = static_cast<T*>(a.y) + row * a.out;
  const T* bias = static_cast<const T*>(a.bias);
  for (int i = 0; i < n; ++i) y[o + i] = from_float<T>(total[i] + (bias == nullptr ? 0.0f : to_float(bias[o + i])));
}

// --- one row or two: their sums stay in registers from the first input to the last

// All R rows times O outputs; the weights of the next O are asked for meanwhile.
template <class T, int R, int O>
static inline void linear_tile(const Linear& a, int64_t o) {
  float total[R * O];
  const T *x = static_cast<const T*>(a.x), *weight = weight_row<T>(a, o);
  const AskInOrder<O * W* static_cast<int>(sizeof(T))> ask{reinterpret_cast<const char*>(weight + O * a.in)};
  dots<R, O>([&](int r) { return x + r * a.x_stride; }, [&](int i) { return weight + i * a.in; }, a.in, total, ask);
  for (int r = 0; r < R; ++r) finish<T>(a, r, o, O, total + r * O);
}

template <class T, int R, int O>
static void linear_in_registers(const Linear& a) {
  parallel_for((a.out + O - 1) / O, O * a.in * (R + 1) / 4, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * O; o < end * O && o < a.out;) {
      if (o + O <= a.out) {
        linear_tile<T, R, O>(a, o);
        o += O;
      } else {
        linear_tile<T, R, 1>(a, o++);
      }
    }
  });
}

// --- more rows: a block of x at a time stays in the first cache while a few outputs' weights pass by

constexpr int kGroup = 8;         // outputs whose sums are held in memory meanwhile
constexpr int64_t kRows = 16;     // of a block
constexpr int64_t kInputs = 256;  // of a block

// f(row, rows, in, ins) for the blocks of x.
template <class F>
static inline void blocks_of_rows(int64_t rows, F f) {
  for (int64_t row = 0; row < rows; row += kRows) f(row, row + kRows < rows ? kRows : rows - row);
}
template <class F>
static inline void blocks_of_inputs(int64_t in, F f) {
  for (int64_t i = 0; i < in; i += kInputs) f(i, i + kInputs < in ? kInputs : in - i);
}

// Continues the sums of R rows of a block and O outputs.
template <class T, int R, int O>
static inline void group_tile(const float* x, const T* weight, int64_t in, int64_t n, bool first, float* sums) {
  V sum[R * O];
  ICON2_UNROLL
  for (int r = 0; r < R; ++r) ICON2_UNROLL
  for (int o = 0; o < O; ++o) sum[r * O + o] = first ? vset(0.0f) : vload(sums + (r * kGroup + o) * W);
  add_dots<R, O>([&](int r) { return x + r * n; }, [&](int o) { return weight + o * in; }, n, sum);
  ICON2_UNROLL
  for (int r = 0; r < R; ++r) ICON2_UNROLL
  for (int o = 0; o < O; ++o) vstore(sums + (r * kGroup + o) * W, sum[r * O + o]);
}

// The last group may have fewer outputs. `x` is laid out in blocks, see `pack`.
template <class T>
static void linear_group(const Linear& a, const float* x, int64_t group, float* sums) {
  const T* weight = weight_row<T>(a, group * kGroup);
  const int outs = a.out - group * kGroup < kGroup ? static_cast<int>(a.out - group * kGroup) : kGroup;
  const char* next = reinterpret_cast<const char*>(weight + kGroup * a.in);
  blocks_of_rows(a.rows, [&](int64_t row, int64_t rows) {
    blocks_of_inputs(a.in, [&](int64_t i, int64_t n) {
      for (int o = 0; o < outs; o += 2) {
        if (row == 0) {  // once: the next group's weights, as much of them as is read of these
          const int64_t bytes = 2 * n * static_cast<int64_t>(sizeof(T));
          ask_for(next, bytes);
          next += bytes;
        }
        in_tiles(rows, [&](auto size, int64_t r) {
          constexpr int R = decltype(size)::value;
          const auto tile = o + 1 < outs ? group_tile<T, R, 2> : group_tile<T, R, 1>;
          tile(x + row * a.in + i * rows + r * n, weight + o * a.in + i, a.in, n, i == 0, sums + (r * kGroup + o) * W);
        });
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      V sum[kGroup];
      float total[kGroup];
      for (int o = 0; o < kGroup; ++o) sum[o] = vload(sums + (r * kGroup + o) * W);
      vsums<kGroup>(sum, total);
      finish<T>(a, row + r, group * kGroup, outs, total);
    }
  });
}

// x as floats, in the order in which the groups read it: blocks of rows, blocks of their inputs, rows, inputs.
template <class T>
static void pack(const Linear& a, float* to) {
  blocks_of_rows(a.rows, [&](int64_t row, int64_t rows) {
    blocks_of_inputs(a.in, [&](int64_t i, int64_t n) {
      for (int64_t r = 0; r < rows; ++r, to += n) {
        const T* from = static_cast<const T*>(a.x) + (row + r) * a.x_stride + i;
        chunks(n, [&](int64_t j, int m) { vstore(to + j, vload(from + j, m), m); });
      }
    });
  });
}

template <class T>
static void linear_by_groups(const Linear& a) {
  Scratch<float> x(a.rows * a.in);
  pack<T>(a, x.p);
  parallel_for((a.out + kGroup - 1) / kGroup, kGroup * a.in * (a.rows + 1) / 4, [&](int64_t begin, int64_t end) {
    Scratch<float> sums(kRows * kGroup * W);
    // In the last group some are read that no output writes.
    std::memset(sums.p, 0, kRows * kGroup * W * sizeof(float));
    for (int64_t group = begin; group < end; ++group) linear_group<T>(a, x.p, group, sums.p);
  });
}

template <class T>
static void linear_of(const Linear& a) {
  a.rows == 1   ? linear_in_registers<T, 1, 8>(a)
  : a.rows == 2 ? linear_in_registers<T, 2, 4>(a)
                : linear_by_groups<T>(a);
}

static void linear(const Linear& a) {
  a.dtype == DType::f32 ? linear_of<float>(a) : a.dtype == DType::bf16 ? linear_of<bf16>(a) : linear_of<f16>(a);
}
