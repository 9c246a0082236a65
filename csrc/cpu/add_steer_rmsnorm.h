// Residual add, the steering law and RMSNorm: a row at a time, from the cache after the first read.

static inline float norm(const float* h, int64_t n) { return std::sqrt(dot(h, h, n)); }

template <class T, class R>
static void add_steer_rmsnorm_row(const AddSteerRmsnorm& a, int64_t row, float* h, float* c) {
  const int64_t n = a.hidden;
  const R* residual = static_cast<const R*>(a.residual) + row * a.residual_stride;
  R* out = static_cast<R*>(a.out) + row * n;
  if (a.x != nullptr) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    chunks(n, [&](int64_t i, int m) { vstore(h + i, vadd(vload(residual + i, m), vload(x + i, m)), m); });
  } else {
    chunks(n, [&](int64_t i, int m) { vstore(h + i, vload(residual + i, m), m); });
  }

  if (a.which != nullptr) {
    const int64_t which = a.which[row];
    const int64_t place = which * a.n_layers + a.layer;
    const int count = which < 0 ? 0 : a.count[place];
    const auto direction = [&](int k) { return a.bank + (a.index[place * a.terms + k] * a.n_layers + a.layer) * n; };
    float* measured = a.measured == nullptr ? nullptr : a.measured + row * (1 + a.terms);
    if (measured != nullptr) {
      measured[0] = norm(h, n);
      for (int k = 0; k < a.terms; ++k) measured[1 + k] = k < count ? dot(h, direction(k), n) : 0.0f;
    }
    if (count > 0) {
      const bool rescale = a.keep_norm[which];
      const float before = rescale ? norm(h, n) : 0.0f;
      for (int k = 0; k < count; ++k) {
        const float alpha = a.alpha[place * a.terms + k], beta = a.beta[place * a.terms + k];
        c[k] = coefficient(alpha, beta, beta == 0.0f ? 0.0f : dot(h, direction(k), n));
      }
      chunks(n, [&](int64_t i, int m) {
        V push = vset(0.0f);
        for (int k = 0; k < count; ++k) push = vfma(vset(c[k]), vload(direction(k) + i, m), push);
        vstore(h + i, vadd(vload(h + i, m), push), m);
      });
      if (rescale) {
        const V scale = vset(keep_norm_scale(before, norm(h, n)));
        chunks(n, [&](int64_t i, int m) { vstore(h + i, vmul(vload(h + i, m), scale), m); });
      }
    }
  }

  V squares = vset(0.0f);
  chunks(n, [&](int64_t i, int m) {
    const V rounded = vround<R>(vload(h + i, m));
    vstore(h + i, rounded, m);
    vstore(out + i, rounded, m);
    squares = vfma(rounded, rounded, squares);
  });
  const V scale = vset(1.0f / std::sqrt(vsum(squares) / static_cast<float>(n) + a.eps));
  const T* weight = static_cast<const T*>(a.weight);
  T* normed = static_cast<T*>(a.normed) + row * n;
  chunks(n, [&](int64_t i, int m) {
    vstore(normed + i, vmul(vload(weight + i, m), vround<T>(vmul(vload(h + i, m), scale))), m);
  });
}

template <class T, class R>
static void add_steer_rmsnorm_of(const AddSteerRmsnorm& a) {
  parallel_for(a.rows, 8 * a.hidden, [&](int64_t begin, int64_t end) {
    Scratch<float> h(a.hidden), c(a.terms);
    for (int64_t row = begin; row < end; ++row) add_steer_rmsnorm_row<T, R>(a, row, h.p, c.p);
  });
}

static void add_steer_rmsnorm(const AddSteerRmsnorm& a) {
  if (a.dtype == DType::f32) {
    add_steer_rmsnorm_of<float, float>(a);
  } else if (a.dtype == DType::bf16) {
    a.residual_dtype == DType::f32 ? add_steer_rmsnorm_of<bf16, float>(a) : add_steer_rmsnorm_of<bf16, bf16>(a);
  } else {
    a.residual_dtype == DType::f32 ? add_steer_rmsnorm_of<f16, float>(a) : add_steer_rmsnorm_of<f16, f16>(a);
  }
}
