// Vectors of eight floats in plain C++, for compilers to make of them what they can. The other vec_*.h have the same
// functions. Included inside a namespace of its own by isa_*.cpp, after every standard header.

struct V {
  float v[8];
};
constexpr int W = 8;
constexpr const char* kName = "portable";

static inline V vset(float x) {
  V r;
  for (int i = 0; i < W; ++i) r.v[i] = x;
  return r;
}

static inline void vhold(V&) {}

template <class T>
static inline V vload(const T* p) {
  V r;
  for (int i = 0; i < W; ++i) r.v[i] = to_float(p[i]);
  return r;
}

template <class T>
static inline void vstore(T* p, V a) {
  for (int i = 0; i < W; ++i) p[i] = from_float<T>(a.v[i]);
}

#define ICON2_LANEWISE(name, expression)  \
  static inline V name(V a, V b) {        \
    V r;                                  \
    for (int i = 0; i < W; ++i) {         \
      const float x = a.v[i], y = b.v[i]; \
      r.v[i] = expression;                \
    }                                     \
    return r;                             \
  }
ICON2_LANEWISE(vadd, x + y)
ICON2_LANEWISE(vsub, x - y)
ICON2_LANEWISE(vmul, x* y)
ICON2_LANEWISE(vdiv, x / y)
ICON2_LANEWISE(vmax, x > y ? x : y)  // y where one is a NaN
ICON2_LANEWISE(vmin, x < y ? x : y)
#undef ICON2_LANEWISE

static inline V vfma(V a, V b, V c) {
  for (int i = 0; i < W; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}

// 2ⁿ for whole n in [-126, 127]; anything for a NaN.
static inline V vexp2_whole(V n) {
  V r;
  for (int i = 0; i < W; ++i) {
    const float whole = std::isnan(n.v[i]) ? 0.0f : n.v[i];
    r.v[i] = float_of(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
  }
  return r;
}

// To the nearest whole number, for |x| < 2²².
static inline V vround_whole(V a) {
  for (int i = 0; i < W; ++i) a.v[i] = (a.v[i] + 12582912.0f) - 12582912.0f;
  return a;
}

static inline float vsum(V a) {
  float s[4];
  for (int i = 0; i < 4; ++i) s[i] = a.v[i] + a.v[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

static inline float vhmax(V a) {
  float m = a.v[0];
  for (int i = 1; i < W; ++i) m = m > a.v[i] ? m : a.v[i];
  return m;
}

// a where x ≥ low, else 0 (a NaN keeps a).
static inline V vkeep_from(V a, V x, float low) {
  for (int i = 0; i < W; ++i) a.v[i] = x.v[i] < low ? 0.0f : a.v[i];
  return a;
}

template <class T>
static inline V vround(V a) {
  for (int i = 0; i < W; ++i) a.v[i] = to_float(from_float<T>(a.v[i]));
  return a;
}
