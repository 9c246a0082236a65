// The gated activation: silu rounded to the storage type, then the product, as the reference does.

template <class T>
static void silu_mul_of(const SiluMul& a) {
  parallel_for(a.rows, a.width * 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = static_cast<const T*>(a.gate_up) + row * a.stride;
      const T* up = gate + a.width;
      T* out = static_cast<T*>(a.out) + row * a.width;
      chunks(a.width, [&](int64_t i, int m) {
        const V g = vload(gate + i, m);
        const V silu = vdiv(g, vadd(vset(1.0f), vexp(vsub(vset(0.0f), g))));
        vstore(out + i, vmul(vround<T>(silu), vload(up + i, m)), m);
      });
    }
  });
}

static void silu_mul(const SiluMul& a) {
  a.dtype == DType::f32 ? silu_mul_of<float>(a) : a.dtype == DType::bf16 ? silu_mul_of<bf16>(a) : silu_mul_of<f16>(a);
}
