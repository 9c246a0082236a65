// Heads out of the fused projection, optional q/k norm, rotary embedding, K and V into their page slots.

// x normed by its own RMS, times weight: rounded to T after each, as the reference does.
template <class T>
static void head_norm(float* x, const T* weight, int64_t d, float eps) {
  const V scale = vset(1.0f / std::sqrt(dot(x, x, d) / static_cast<float>(d) + eps));
  chunks(d, [&](int64_t i, int m) {
    const V normed = vround<T>(vmul(vload(x + i, m), scale));
    vstore(x + i, vround<T>(vmul(vload(weight + i, m), normed)), m);
  });
}

// x · cos + roll(x, d/2) · sin: the first product is rounded to T, then the sum.
template <class T>
static void rotate(const float* x, const T* cos, const T* sin, int64_t d, T* out) {
  const int64_t half = d / 2;
  const auto part = [&](int64_t from, int64_t other) {
    chunks(half, [&](int64_t i, int m) {
      const V first = vround<T>(vmul(vload(x + from + i, m), vload(cos + from + i, m)));
      vstore(out + from + i, vfma(vload(x + other + i, m), vload(sin + from + i, m), first), m);
    });
  };
  part(0, half);
  part(half, 0);
}

template <class T>
static void rope_append_of(const RopeAppend& a) {
  const int64_t d = a.d, all = a.heads + 2 * a.kv_heads;
  parallel_for(a.rows, all * d * 4, [&](int64_t begin, int64_t end) {
    Scratch<float> x(d);
    for (int64_t row = begin; row < end; ++row) {
      const T* in = static_cast<const T*>(a.qkv) + row * a.qkv_stride;
      const T *cos = static_cast<const T*>(a.cos) + row * d, *sin = static_cast<const T*>(a.sin) + row * d;
      const int64_t slot = a.slots[row];
      for (int64_t head = 0; head < a.heads + (slot < 0 ? 0 : a.kv_heads); ++head) {
        const bool of_q = head < a.heads;
        T* out = of_q ? static_cast<T*>(a.q) + (row * a.heads + head) * d
                      : static_cast<T*>(a.k_pages) + (slot * a.kv_heads + head - a.heads) * d;
        chunks(d, [&](int64_t i, int m) { vstore(x.p + i, vload(in + head * d + i, m), m); });
        if (a.q_norm != nullptr) head_norm(x.p, static_cast<const T*>(of_q ? a.q_norm : a.k_norm), d, a.eps);
        rotate(x.p, cos, sin, d, out);
      }
      if (slot >= 0) {
        const T* v = in + (a.heads + a.kv_heads) * d;
        T* out = static_cast<T*>(a.v_pages) + slot * a.kv_heads * d;
        std::memcpy(out, v, static_cast<size_t>(a.kv_heads * d) * sizeof(T));
      }
    }
  });
}

static void rope_append(const RopeAppend& a) {
  a.dtype == DType::f32    ? rope_append_of<float>(a)
  : a.dtype == DType::bf16 ? rope_append_of<bf16>(a)
                           : rope_append_of<f16>(a);
}
