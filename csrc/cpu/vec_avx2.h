// Vectors of eight floats in AVX2, FMA and F16C.

using V = __m256;
constexpr int W = 8;
constexpr const char* kName = "avx2";

static inline V vset(float x) { return _mm256_set1_ps(x); }

// Left to itself a compiler loads a vector again for every use as an operand.
static inline void vhold(V& a) { __asm__("" : "+x"(a)); }

static inline V vload(const float* p) { return _mm256_loadu_ps(p); }
static inline V vload(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline V vload(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// The fp32 bits after rounding to bf16, low half zero.
static inline __m256i bf16_bits(V a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
}

static inline void vstore(float* p, V a) { _mm256_storeu_ps(p, a); }
static inline void vstore(bf16* p, V a) {
  const __m256i high = _mm256_srli_epi32(bf16_bits(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
static inline void vstore(f16* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline V vadd(V a, V b) { return _mm256_add_ps(a, b); }
static inline V vsub(V a, V b) { return _mm256_sub_ps(a, b); }
static inline V vmul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V vdiv(V a, V b) { return _mm256_div_ps(a, b); }
static inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
static inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
static inline V vfma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }

static inline V vexp2_whole(V n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}

static inline V vround_whole(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline float vsum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// out[i] = vsum(a[i]) for eight vectors, by the same additions: half the instructions of eight times vsum.
#define ICON2_VSUM8
static inline void vsum8(const V* a, float* out) {
  V half[4], quarter[2];
  for (int i = 0; i < 4; ++i)
    half[i] = _mm256_add_ps(_mm256_permute2f128_ps(a[i], a[i + 4], 0x20), _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  for (int i = 0; i < 2; ++i)
    quarter[i] = _mm256_add_ps(_mm256_shuffle_ps(half[2 * i], half[2 * i + 1], 0x44),
                               _mm256_shuffle_ps(half[2 * i], half[2 * i + 1], 0xEE));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_shuffle_ps(quarter[0], quarter[1], 0x88),
                                      _mm256_shuffle_ps(quarter[0], quarter[1], 0xDD)));
}

static inline float vhmax(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline V vkeep_from(V a, V x, float low) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(low), _CMP_LT_OQ), a);
}

template <class T>
static inline V vround(V a);
template <>
inline V vround<float>(V a) {
  return a;
}
template <>
inline V vround<bf16>(V a) {
  return _mm256_castsi256_ps(bf16_bits(a));
}
template <>
inline V vround<f16>(V a) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
