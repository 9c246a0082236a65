// What the kernels need beside the vectors themselves, written over them: loads and stores of a tail, exp, and memory.

// The n < W numbers at p, then zeros.
template <class T>
static inline V vload_tail(const T* p, int n) {
  float padded[W] = {};
  for (int i = 0; i < n; ++i) padded[i] = to_float(p[i]);
  return vload(padded);
}

template <class T>
static inline V vload(const T* p, int n) {
  return n == W ? vload(p) : vload_tail(p, n);
}

template <class T>
static inline void vstore(T* p, V a, int n) {
  if (n == W) {
    vstore(p, a);
    return;
  }
  float padded[W];
  vstore(padded, a);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(padded[i]);
}

#ifndef ICON2_VSUM8
static inline void vsum8(const V* a, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = vsum(a[i]);
}
#endif
#undef ICON2_VSUM8

// out[i] = vsum(a[i]) for n vectors.
template <int n>
static inline void vsums(const V* a, float* out) {
  int i = 0;
  for (; i + 8 <= n; i += 8) vsum8(a + i, out + i);
  for (; i < n; ++i) out[i] = vsum(a[i]);
}

// f(i, n) for every W numbers of `size`; n < W at the end.
template <class F>
static inline void chunks(int64_t size, F f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, W);
  if (i < size) f(i, static_cast<int>(size - i));
}

// exp to about an ulp: 2ⁿ · e^r with |r| ≤ ln 2 / 2 and e^r by its series to r⁷. 0 below -87.3; a NaN stays one.
static inline V vexp(V x) {
  const V inside = vmin(vset(88.0f), vmax(vset(-87.3f), x));
  const V n = vround_whole(vmul(inside, vset(1.44269504f)));
  V r = vfma(n, vset(-0.693359375f), inside);  // ln 2 in two parts, of which the first has few bits
  r = vfma(n, vset(2.12194440e-4f), r);
  V y = vset(1.0f / 5040);
  y = vfma(y, r, vset(1.0f / 720));
  y = vfma(y, r, vset(1.0f / 120));
  y = vfma(y, r, vset(1.0f / 24));
  y = vfma(y, r, vset(1.0f / 6));
  y = vfma(y, r, vset(0.5f));
  y = vfma(y, r, vset(1.0f));
  y = vfma(y, r, vset(1.0f));
  return vkeep_from(vmul(y, vexp2_whole(n)), x, -87.3f);
}

static inline float dot(const float* a, const float* b, int64_t n) {
  V sum = vset(0.0f), more = vset(0.0f);
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum = vfma(vload(a + i), vload(b + i), sum);
    more = vfma(vload(a + i + W), vload(b + i + W), more);
  }
  chunks(n - i, [&](int64_t j, int m) { sum = vfma(vload(a + i + j, m), vload(b + i + j, m), sum); });
  return vsum(vadd(sum, more));
}

// Asks for the cache lines of `bytes` from p on, and does not wait for them. The second cache is far enough: what comes
// into the first too early drives out what is worked on. An address where there is nothing does no harm.
static inline void ask_for(const void* p, int64_t bytes) {
#if defined(__GNUC__) || defined(__clang__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
#else
  (void)p, (void)bytes;
#endif
}

// Asks for consecutive memory from `next` on, `step` bytes at a call. Memory gives its best to one who reads it in
// order.
template <int step>
struct AskInOrder {
  const char* next;
  void operator()() {
    ask_for(next, step);
    next += step;
  }
};

struct AskNothing {
  void operator()() const {}
};

// sum[i * B + j] += a(i) · b(j) over n numbers, as W partial sums, for A rows a(i) and B rows b(j): as many sums at
// once as hide the latency of a multiply-add. Each is summed in the order of the numbers, whatever A and B are. `ask`
// is called for every W numbers. (The loops are written out so that the sums stay in registers.)
template <int A, int B, class RowA, class RowB, class Ask = AskNothing>
static inline void add_dots(const RowA& a, const RowB& b, int64_t n, V* sum, Ask ask = Ask()) {
  V s[A][B];
  ICON2_UNROLL
  for (int i = 0; i < A; ++i) ICON2_UNROLL
  for (int j = 0; j < B; ++j) s[i][j] = sum[i * B + j];
  int64_t at = 0;
  for (; at + W <= n; at += W) {
    ask();
    V right[B];
    ICON2_UNROLL
    for (int j = 0; j < B; ++j) right[j] = vload(b(j) + at);
    ICON2_UNROLL
    for (int i = 0; i < A; ++i) {
      V left = vload(a(i) + at);
      vhold(left);
      ICON2_UNROLL
      for (int j = 0; j < B; ++j) s[i][j] = vfma(left, right[j], s[i][j]);
    }
  }
  if (at < n) {
    const int left = static_cast<int>(n - at);
    ICON2_UNROLL
    for (int i = 0; i < A; ++i) ICON2_UNROLL
    for (int j = 0; j < B; ++j) s[i][j] = vfma(vload_tail(a(i) + at, left), vload_tail(b(j) + at, left), s[i][j]);
  }
  ICON2_UNROLL
  for (int i = 0; i < A; ++i) ICON2_UNROLL
  for (int j = 0; j < B; ++j) sum[i * B + j] = s[i][j];
}

// total[i * B + j] = ⟨a(i), b(j)⟩ over n numbers.
template <int A, int B, class RowA, class RowB, class Ask = AskNothing>
static inline void dots(const RowA& a, const RowB& b, int64_t n, float* total, Ask ask = Ask()) {
  V sum[A * B];
  ICON2_UNROLL
  for (int i = 0; i < A; ++i) ICON2_UNROLL
  for (int j = 0; j < B; ++j) sum[i * B + j] = vset(0.0f);
  add_dots<A, B>(a, b, n, sum, ask);
  vsums<A * B>(sum, total);
}

// f(size, i) for one tile of `wanted` rows, at most `size`.
template <int size, class F>
static inline void in_tile(int64_t wanted, int64_t i, F& f) {
  if constexpr (size > 1) {
    if (wanted < size) return in_tile<size - 1>(wanted, i, f);
  }
  f(std::integral_constant<int, size>(), i);
}

// f(size, i) for tiles of up to six of n rows, as even as can be: `size` (a constant, by its type) rows from i on.
template <class F>
static inline void in_tiles(int64_t n, F f) {
  for (int64_t i = 0, size = 0; i < n; i += size) {
    const int64_t left = n - i, tiles = (left + 5) / 6;
    size = (left + tiles - 1) / tiles;
    in_tile<6>(size, i, f);
  }
}

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Memory for the time of a call, not initialised.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n) : p(static_cast<T*>(std::malloc(static_cast<size_t>(n > 0 ? n : 1) * sizeof(T)))) {
    if (p == nullptr) std::abort();
  }
  ~Scratch() { std::free(p); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* p;
};
