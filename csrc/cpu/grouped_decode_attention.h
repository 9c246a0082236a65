// Attention over paged KV for one query position per row.
//
// K and V of an item are read once and in the order of memory, for all its rows and query heads: a few positions of all
// KV heads at a time, which stay in the first cache for as long as any query needs them. Then each row's parts are
// merged in the order of their positions.

// NQ queries [d] with stride `stride` times NP positions: scores[q][p]. A position's numbers are those from `offset`
// on.
template <class T, int NQ, int NP>
static inline void score_tile(const float* q, int64_t stride, const T* const* k, int64_t offset, int64_t d,
                              float* scores, int64_t span) {
  float total[NQ * NP];
  dots<NQ, NP>([&](int n) { return q + n * stride; }, [&](int p) { return k[p] + offset; }, d, total);
  for (int n = 0; n < NQ; ++n) std::memcpy(scores + n * span, total + n * NP, NP * sizeof(float));
}

template <class T, int NQ>
ICON2_APART static void score(const float* q, int64_t stride, const T* const* k, int64_t offset, int64_t length,
                              int64_t d, float* scores, int64_t span) {
  constexpr int NP = NQ >= 4 ? 2 : NQ == 3 ? 3 : 8 / NQ;
  int64_t p = 0;
  for (; p + NP <= length; p += NP) score_tile<T, NQ, NP>(q, stride, k + p, offset, d, scores + p, span);
  for (; p < length; ++p) score_tile<T, NQ, 1>(q, stride, k + p, offset, d, scores + p, span);
}

// NQ queries' weighted sums over NV vectors of V's columns, of whose last `m` numbers exist: `out`, or added to it.
template <class T, int NQ, int NV>
static inline void blend_tile(const float* weights, int64_t span, const T* const* v, int64_t offset, int64_t length,
                              int m, bool first, float* out, int64_t stride) {
  V sum[NQ][NV];
  ICON2_UNROLL
  for (int n = 0; n < NQ; ++n) ICON2_UNROLL
  for (int j = 0; j < NV; ++j) sum[n][j] = first ? vset(0.0f) : vload(out + n * stride + j * W);
  for (int64_t p = 0; p < length; ++p) {
    V value[NV];
    ICON2_UNROLL
    for (int j = 0; j < NV; ++j) value[j] = vload(v[p] + offset + j * W, j == NV - 1 ? m : W);
    ICON2_UNROLL
    for (int n = 0; n < NQ; ++n) {
      const V weight = vset(weights[n * span + p]);
      ICON2_UNROLL
      for (int j = 0; j < NV; ++j) sum[n][j] = vfma(weight, value[j], sum[n][j]);
    }
  }
  ICON2_UNROLL
  for (int n = 0; n < NQ; ++n) ICON2_UNROLL
  for (int j = 0; j < NV; ++j) vstore(out + n * stride + j * W, sum[n][j]);  // rows of `out` are padded
}

template <class T, int NQ>
ICON2_APART static void blend(const float* weights, int64_t span, const T* const* v, int64_t offset, int64_t length,
                              int64_t d, bool first, float* out, int64_t stride) {
  constexpr int NV = NQ >= 4 ? 2 : 4;
  int64_t i = 0;
  for (; i + NV * W <= d; i += NV * W)
    blend_tile<T, NQ, NV>(weights, span, v, offset + i, length, W, first, out + i, stride);
  for (; i < d; i += W) {
    const int m = d - i < W ? static_cast<int>(d - i) : W;
    blend_tile<T, NQ, 1>(weights, span, v, offset + i, length, m, first, out + i, stride);
  }
}

// exp(score − largest) in place; the largest and the sum.
static inline SoftmaxPart soften(float* scores, int64_t length) {
  V most = vset(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + W <= length; i += W) most = vmax(most, vload(scores + i));
  float m = vhmax(most);
  for (; i < length; ++i) m = m > scores[i] ? m : scores[i];
  V sum = vset(0.0f);
  const V largest = vset(m);
  for (i = 0; i + W <= length; i += W) {
    const V weight = vexp(vsub(vload(scores + i), largest));
    vstore(scores + i, weight);
    sum = vadd(sum, weight);
  }
  float l = vsum(sum);
  if (i < length) {
    const int rest = static_cast<int>(length - i);
    float tail[W];
    vstore(tail, vexp(vsub(vload(scores + i, rest), largest)));
    for (int j = 0; j < rest; ++j) {
      scores[i + j] = tail[j];
      l += tail[j];
    }
  }
  return {m, l};
}

template <class T>
static inline void ask_for_rows(const T* const* rows, int64_t begin, int64_t end, int64_t bytes) {
  for (int64_t p = begin; p < end; ++p) ask_for(rows[p], bytes);
}

// How many rows are worked on at a time: those that take a quarter of the first cache, but as many as a tile at least.
static inline int64_t block_of(int64_t bytes) {
  const int64_t fit = 8192 / bytes / 8 * 8;
  return fit > 8 ? fit : 8;
}

// f(head, begin, end) for `block` of rows [0, length) at a time and each of their heads. The rows after them, up to
// `there`, are asked for meanwhile; `bytes` of each.
template <class T, class F>
static inline void walk(const T* const* rows, int64_t length, int64_t there, int64_t heads, int64_t bytes,
                        int64_t block, F f) {
  for (int64_t begin = 0; begin < length; begin += block) {
    const int64_t end = begin + block < length ? begin + block : length;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t from = end + head * block / heads, to = end + (head + 1) * block / heads;
      ask_for_rows(rows, from, to < there ? to : there, bytes);
      f(head, begin, end);
    }
  }
}

// The item's queries of `heads` KV heads from `head` on against its positions; results to their places in `parts` and
// `sums`.
template <class T>
static void attend_item(const Attention& a, int64_t item, int64_t head, int64_t heads, SoftmaxPart* parts,
                        float* sums) {
  const int64_t length = a.lengths[item], d = a.d, wide = padded(d), group = a.heads / a.kv_heads;
  const int32_t *rows = a.rows + item * a.rows_stride, *pages = a.pages + item * a.pages_stride;
  const int64_t most = a.width * group, span = padded(length);

  Scratch<int64_t> places(most);  // of every query of the first head, in `parts`
  Scratch<float> memory(heads * most * (2 * wide + span));
  float *q = memory.p, *out = q + heads * most * wide, *scores = out + heads * most * wide;
  int64_t n = 0;
  for (int64_t i = 0; i < a.width; ++i) {
    const int64_t row = rows[i];
    if (row < 0 || a.n_splits[row] <= a.splits[item]) continue;
    for (int64_t g = 0; g < group; ++g, ++n) {
      for (int64_t h = 0; h < heads; ++h) {
        const T* from = static_cast<const T*>(a.q) + row * a.q_stride + ((head + h) * group + g) * d;
        float* to = q + (h * most + n) * wide;
        chunks(d, [&](int64_t j, int m) { vstore(to + j, vmul(vload(from + j, m), vset(a.scale)), m); });
      }
      places.p[n] = (a.starts[row] + a.splits[item]) * a.heads + head * group + g;
    }
  }
  if (n == 0) return;

  Scratch<const T*> kv(2 * length);  // K of every position, then V
  for (int64_t p = 0; p < length; ++pages) {
    int64_t at = (*pages * a.page_size * a.kv_heads + head) * d;
    for (const int64_t end = p + a.page_size; p < end && p < length; ++p, at += a.kv_heads * d) {
      kv.p[p] = static_cast<const T*>(a.k_pages) + at;
      kv.p[length + p] = static_cast<const T*>(a.v_pages) + at;
    }
  }

  const int64_t bytes = heads * d * static_cast<int64_t>(sizeof(T)), block = block_of(bytes);
  ask_for_rows(kv.p, 0, block < length ? block : length, bytes);

  walk(kv.p, length, 2 * length, heads, bytes, block, [&](int64_t h, int64_t begin, int64_t end) {
    in_tiles(n, [&](auto size, int64_t i) {
      score<T, decltype(size)::value>(q + (h * most + i) * wide, wide, kv.p + begin, h * d, end - begin, d,
                                      scores + (h * most + i) * span + begin, span);
    });
  });
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < n; ++i) parts[places.p[i] + h * group] = soften(scores + (h * most + i) * span, length);
  const T* const* v = kv.p + length;
  walk(v, length, length, heads, bytes, block, [&](int64_t h, int64_t begin, int64_t end) {
    in_tiles(n, [&](auto size, int64_t i) {
      blend<T, decltype(size)::value>(scores + (h * most + i) * span + begin, span, v + begin, h * d, end - begin, d,
                                      begin == 0, out + (h * most + i) * wide, wide);
    });
  });
  const size_t vectors = static_cast<size_t>((d + W - 1) / W * W) * sizeof(float);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(sums + (places.p[i] + h * group) * wide, out + (h * most + i) * wide, vectors);
}

template <class T>
static void attention_of(const Attention& a) {
  const int64_t d = a.d, wide = padded(d);
  int64_t used = 0;  // places for partial results
  for (int64_t row = 0; row < a.batch; ++row)
    if (a.n_splits[row] > 0) used = used > a.starts[row] + a.n_splits[row] ? used : a.starts[row] + a.n_splits[row];
  const int64_t n_parts = used * a.heads;
  Scratch<float> memory(n_parts * (wide + 2));
  float* sums = memory.p;
  SoftmaxPart* parts = reinterpret_cast<SoftmaxPart*>(sums + n_parts * wide);
  for (int64_t i = 0; i < n_parts; ++i) parts[i] = {-std::numeric_limits<float>::infinity(), 0.0f};

  int64_t longest = 1;
  for (int64_t item = 0; item < a.n; ++item) longest = longest > a.lengths[item] ? longest : a.lengths[item];
  const int64_t queries = a.width * (a.heads / a.kv_heads);
  parallel_for(a.n * a.kv_heads, longest * d * (queries + 1), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin, heads = 0; unit < end; unit += heads) {
      const int64_t item = unit / a.kv_heads, head = unit % a.kv_heads;
      heads = a.kv_heads - head < end - unit ? a.kv_heads - head : end - unit;
      const bool holds = a.layers[2 * item] <= a.layer && a.layer < a.layers[2 * item + 1];
      if (holds && a.lengths[item] > 0) attend_item<T>(a, item, head, heads, parts, sums);
    }
  });

  const auto exp1 = [](float x) { return std::exp(x); };
  parallel_for(a.batch, a.heads * d * 4, [&](int64_t begin, int64_t end) {
    Scratch<float> merged(wide);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < a.heads; ++head) {
        T* out = static_cast<T*>(a.out) + (row * a.heads + head) * d;
        const int64_t n = a.n_splits[row], first = a.starts[row] * a.heads + head;
        float most = -std::numeric_limits<float>::infinity(), l = 0.0f;
        for (int64_t s = 0; s < n; ++s) {
          const SoftmaxPart& part = parts[first + s * a.heads];
          most = most > part.m ? most : part.m;
        }
        for (int64_t j = 0; j < wide; ++j) merged.p[j] = 0.0f;
        for (int64_t s = 0; s < n; ++s) {
          const SoftmaxPart& part = parts[first + s * a.heads];
          const float weight = part_weight(part, most, exp1);
          if (part.l == 0.0f) continue;  // nothing was written at its place
          l += weight * part.l;
          const float* sum = sums + (first + s * a.heads) * wide;
          for (int64_t j = 0; j < d; j += W)
            vstore(merged.p + j, vfma(vset(weight), vload(sum + j), vload(merged.p + j)));
        }
        const V inverse = vset(n > 0 ? (l == l ? inverse_mass(l) : l) : 0.0f);
        chunks(d, [&](int64_t j, int m) { vstore(out + j, vmul(vload(merged.p + j, m), inverse), m); });
      }
    }
  });
}

static void grouped_decode_attention(const Attention& a) {
  a.dtype == DType::f32    ? attention_of<float>(a)
  : a.dtype == DType::bf16 ? attention_of<bf16>(a)
                           : attention_of<f16>(a);
}
