// icon2_rt._native: each op checks its arguments, then calls the kernel of the instruction set in use.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/begin_step.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "sample_tensors.h"
#include "shared/philox.h"
#include "tensor.h"

#ifndef ICON2_BUILD
#define ICON2_BUILD "cpu"
#endif

namespace icon2 {

// In csrc/cuda; there where the build had nvcc.
#ifdef __GNUC__
__attribute__((weak))
#endif
void bind_cuda(py::module_& m);

namespace {

// Of what icon2_rt/ops/native.py calls; both change together.
constexpr int kInterface = 2;

const Kernels* kernels = nullptr;

// AVX-512 has to be asked for: no stored result shows it faster.
const Kernels* best() {
  if (const Kernels* k = avx2()) return k;
  return &kPortable;
}

py::list instruction_sets() {
  py::list names;
  for (const Kernels* k : {&kPortable, avx2(), avx512()})
    if (k != nullptr) names.append(k->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Kernels* k : {&kPortable, avx2(), avx512()}) {
    if (k != nullptr && name == k->name) {
      kernels = k;
      return;
    }
  }
  throw py::value_error("instruction set '" + name + "' is not one of " + std::string(py::str(instruction_sets())));
}

// A step that is captured: its kernels with their arguments, in order, and the tensors whose memory they use. What this
// thread runs between begin() and end() becomes part of it; other threads, and their captures, go their own way.
class Program {
 public:
  Program() = default;
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() { close(); }

  void begin() {
    if (recording != nullptr || ended_)
      throw std::runtime_error(ended_ ? "this program has been captured: a new step needs a new one"
                                      : "this thread is capturing a step already");
    recording = this;
    kept = &tensors_;
  }

  // Called by the thread that began. False: a part of the step was not ours, so it cannot be repeated.
  bool end() {
    if (recording != this) throw std::runtime_error("this thread is not capturing this program");
    close();
    ended_ = true;
    return !spoilt_;
  }

  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

  void repeat() const {
    if (!ended_ || spoilt_) throw std::runtime_error("this program holds no whole step");
    giving_way(work_, [this] {
      for (const auto& call : calls_) call();
    });
  }

  // `f` holds its arguments by value: a captured step calls it again.
  template <class F>
  static void run(int64_t work, F f) {
    giving_way(work, f);
    if (recording != nullptr) recording->add(work, std::move(f));
  }

  // What this thread runs now is not ours: a step that it captures cannot be repeated.
  static void spoil() {
    if (recording == nullptr) return;
    recording->spoilt_ = true;
    recording->calls_.clear();
    recording->tensors_.clear();
  }

 private:
  void add(int64_t work, std::function<void()> call) {
    if (spoilt_) return;
    work_ += work;
    calls_.push_back(std::move(call));
  }

  void close() {
    if (recording != this) return;
    recording = nullptr;
    kept = nullptr;
  }

  // Other Python threads may run while kernels work for long; for short ones giving way costs more than it is worth.
  template <class F>
  static void giving_way(int64_t work, const F& f) {
    if (work < kWorkPerThread) {
      f();
    } else {
      const py::gil_scoped_release release;
      f();
    }
  }

  static thread_local Program* recording;  // what this thread captures now

  std::vector<std::function<void()>> calls_;
  std::vector<py::object> tensors_;
  int64_t work_ = 0;
  bool ended_ = false, spoilt_ = false;
};

thread_local Program* Program::recording = nullptr;

template <class F>
void run(int64_t work, F f) {
  Program::run(work, std::move(f));
}

void py_embed(py::handle tokens_, py::handle weight_, py::handle out_) {
  const Tensor tokens("tokens", tokens_, Kind::i64), weight("weight", weight_, Kind::floating),
      out("out", out_, Kind::floating);
  tokens.shaped({-1}).dense();
  weight.shaped({-1, -1}).dense();
  const int64_t rows = tokens.dim(0), hidden = weight.dim(1);
  out.shaped({rows, hidden}).dense().like(weight);
  within<int64_t>(tokens, rows, 0, weight.dim(0));
  out.apart({&tokens, &weight});
  const auto bytes = static_cast<size_t>(hidden) * (weight.dtype() == DType::f32 ? 4 : 2);
  run(rows * hidden, [rows, bytes, ids = tokens.as<int64_t>(), from = weight.as<char>(), to = out.as<char>()] {
    for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * bytes, from + ids[row] * bytes, bytes);
  });
}

void py_add_steer_rmsnorm(py::handle x_, py::handle residual_, py::handle weight_, float eps, py::handle bank_,
                          py::handle count_, py::handle index_, py::handle alpha_, py::handle beta_,
                          py::handle keep_norm_, py::handle which_, int64_t layer, py::handle measured_,
                          py::handle out_, py::handle normed_) {
  const Tensor residual("residual", residual_, Kind::floating), weight("weight", weight_, Kind::floating);
  const Tensor x = optional("x", x_, Kind::floating);
  residual.shaped({-1, -1}).dense(1);
  const int64_t rows = residual.dim(0), hidden = residual.dim(1);
  weight.shaped({hidden}).dense();
  if (x) x.shaped({rows, hidden}).dense(1).like(weight);
  if (residual.dtype() != DType::f32) residual.like(weight);
  const Tensor out("out", out_, Kind::floating), normed("normed", normed_, Kind::floating);
  out.shaped({rows, hidden}).dense().like(residual);
  normed.shaped({rows, hidden}).dense().like(weight);

  AddSteerRmsnorm a{};
  a.rows = rows;
  a.hidden = hidden;
  a.dtype = weight.dtype();
  a.residual_dtype = residual.dtype();
  a.x = x.as<void>();
  a.residual = residual.data();
  a.weight = weight.data();
  a.x_stride = x ? x.stride(0) : 0;
  a.residual_stride = residual.stride(0);
  a.eps = eps;
  a.out = out.data();
  a.normed = normed.data();

  if (which_.is_none()) {
    out.apart({&x, &residual, &weight, &normed});
    normed.apart({&x, &residual, &weight});
  } else {
    const Tensor bank("bank", bank_, Kind::f32), count("count", count_, Kind::i32), index("index", index_, Kind::i32),
        alpha("alpha", alpha_, Kind::f32), beta("beta", beta_, Kind::f32),
        keep_norm("keep_norm", keep_norm_, Kind::boolean), which("which", which_, Kind::i32);
    const Tensor measured = optional("measured", measured_, Kind::f32);
    bank.shaped({-1, -1, hidden}).dense();
    const int64_t layers = bank.dim(1);
    index.shaped({-1, layers, -1}).dense();
    const int64_t steerings = index.dim(0), terms = index.dim(2);
    count.shaped({steerings, layers}).dense();
    alpha.shaped({steerings, layers, terms}).dense();
    beta.shaped({steerings, layers, terms}).dense();
    keep_norm.shaped({steerings}).dense();
    which.shaped({rows}).dense();
    if (measured) measured.shaped({rows, 1 + terms}).dense();
    if (layer < 0 || layer >= layers)
      throw py::value_error("layer must be in [0, " + std::to_string(layers) + "), not " + std::to_string(layer));
    within<int32_t>(which, rows, -1, steerings);
    const int32_t* counts = count.as<int32_t>();
    const int32_t* places = index.as<int32_t>();
    for (int64_t s = 0; s < steerings; ++s) {
      const int64_t at = s * layers + layer;
      bool good = counts[at] >= 0 && counts[at] <= terms;
      for (int64_t k = 0; good && k < counts[at]; ++k)
        good = places[at * terms + k] >= 0 && places[at * terms + k] < bank.dim(0);
      if (!good)
        throw py::index_error("steering " + std::to_string(s) + " at block " + std::to_string(layer) +
                              ": count must be in [0, " + std::to_string(terms) + "] and index in [0, " +
                              std::to_string(bank.dim(0)) + ")");
    }
    out.apart({&x, &residual, &weight, &normed, &measured, &bank, &count, &index, &alpha, &beta, &keep_norm, &which});
    normed.apart({&x, &residual, &weight, &measured, &bank, &count, &index, &alpha, &beta, &keep_norm, &which});
    measured.apart({&x, &residual, &weight, &bank, &count, &index, &alpha, &beta, &keep_norm, &which});
    a.n_layers = layers;
    a.terms = terms;
    a.layer = layer;
    a.bank = bank.as<float>();
    a.count = counts;
    a.index = places;
    a.alpha = alpha.as<float>();
    a.beta = beta.as<float>();
    a.keep_norm = keep_norm.as<bool>();
    a.which = which.as<int32_t>();
    a.measured = measured.as<float>();
  }
  run(rows * hidden * 8, [a, of = kernels] { of->add_steer_rmsnorm(a); });
}

void py_rope_append(py::handle qkv_, py::handle cos_, py::handle sin_, py::handle q_norm_, py::handle k_norm_,
                    float eps, py::handle k_pages_, py::handle v_pages_, py::handle slots_, py::handle q_) {
  const Tensor qkv("qkv", qkv_, Kind::floating), cos("cos", cos_, Kind::floating), sin("sin", sin_, Kind::floating),
      k_pages("k_pages", k_pages_, Kind::floating), v_pages("v_pages", v_pages_, Kind::floating),
      slots("slots", slots_, Kind::i64), q("q", q_, Kind::floating);
  const Tensor q_norm = optional("q_norm", q_norm_, Kind::floating),
               k_norm = optional("k_norm", k_norm_, Kind::floating);
  qkv.shaped({-1, -1}).dense(1);
  k_pages.shaped({-1, -1, -1, -1}).dense().like(qkv);
  const int64_t rows = qkv.dim(0), kv_heads = k_pages.dim(2), d = k_pages.dim(3);
  v_pages.shaped({k_pages.dim(0), k_pages.dim(1), kv_heads, d}).dense().like(qkv);
  q.shaped({rows, -1, d}).dense().like(qkv);
  const int64_t heads = q.dim(1);
  qkv.shaped({rows, (heads + 2 * kv_heads) * d});
  cos.shaped({rows, 1, d}).dense().like(qkv);
  sin.shaped({rows, 1, d}).dense().like(qkv);
  slots.shaped({rows}).dense();
  if (d % 2) throw py::value_error("heads must have an even size, not " + std::to_string(d));
  if (static_cast<bool>(q_norm) != static_cast<bool>(k_norm))
    throw py::value_error("q_norm and k_norm must be given together");
  if (q_norm) {
    q_norm.shaped({d}).dense().like(qkv);
    k_norm.shaped({d}).dense().like(qkv);
  }
  within<int64_t>(slots, rows, -1, k_pages.dim(0) * k_pages.dim(1));
  q.apart({&qkv, &cos, &sin, &k_pages, &v_pages, &slots, &q_norm, &k_norm});
  k_pages.apart({&qkv, &cos, &sin, &v_pages, &slots, &q_norm, &k_norm});
  v_pages.apart({&qkv, &cos, &sin, &slots, &q_norm, &k_norm});
  const RopeAppend a{rows,
                     heads,
                     kv_heads,
                     d,
                     qkv.dtype(),
                     qkv.data(),
                     qkv.stride(0),
                     cos.data(),
                     sin.data(),
                     q_norm.as<void>(),
                     k_norm.as<void>(),
                     eps,
                     k_pages.data(),
                     v_pages.data(),
                     slots.as<int64_t>(),
                     q.data()};
  run(rows * qkv.dim(1) * 4, [a, of = kernels] { of->rope_append(a); });
}

void py_begin_step(py::handle positions_, py::handle running_, py::handle tables_, int64_t page_size,
                   py::handle inv_freq_, float rope_scaling, py::handle rows_, py::handle splits_, py::handle count_,
                   py::handle lengths_, py::handle n_splits_, int64_t split, py::handle slots_, py::handle cos_,
                   py::handle sin_) {
  const Tensor positions("positions", positions_, Kind::i32), running("running", running_, Kind::boolean),
      tables("tables", tables_, Kind::i32), inv_freq("inv_freq", inv_freq_, Kind::f32), rows("rows", rows_, Kind::i32),
      splits("splits", splits_, Kind::i32), count("count", count_, Kind::i32), lengths("lengths", lengths_, Kind::i32),
      n_splits("n_splits", n_splits_, Kind::i32), slots("slots", slots_, Kind::i64), cos("cos", cos_, Kind::floating),
      sin("sin", sin_, Kind::floating);
  positions.shaped({-1}).dense();
  inv_freq.shaped({-1}).dense();
  const int64_t batch = positions.dim(0), half = inv_freq.dim(0);
  running.shaped({batch}).dense();
  tables.shaped({batch, -1}).dense(1);
  rows.shaped({-1, -1}).dense(1);
  const int64_t n = rows.dim(0);
  splits.shaped({n}).dense();
  count.shaped({1}).dense();
  lengths.shaped({n}).dense();
  n_splits.shaped({batch}).dense();
  slots.shaped({batch}).dense();
  cos.shaped({batch, 1, 2 * half}).dense();
  sin.shaped({batch, 1, 2 * half}).dense().like(cos);
  if (page_size < 1 || split < 1) throw py::value_error("page_size and split must be at least 1");
  if (n > 0 && rows.dim(1) == 0) throw py::value_error("rows must have a place in every item");
  const int64_t used = std::clamp<int64_t>(count.as<int32_t>()[0], 0, n);
  within<int32_t>(rows, used, -1, batch);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t position = positions.as<int32_t>()[row];
    if (running.as<bool>()[row] && (position < 0 || position / page_size >= tables.dim(1)))
      throw py::index_error("row " + std::to_string(row) + " is at position " + std::to_string(position) +
                            ", its table has " + std::to_string(tables.dim(1)) + " pages of " +
                            std::to_string(page_size) + " tokens");
  }
  for (const Tensor* written : {&lengths, &n_splits, &slots, &cos, &sin})
    written->apart(
        {&positions, &running, &tables, &inv_freq, &rows, &splits, &count, &lengths, &n_splits, &slots, &cos, &sin});
  const BeginStep a{batch,
                    tables.stride(0),
                    page_size,
                    half,
                    n,
                    n ? rows.dim(1) : 0,
                    rows.stride(0),
                    used,
                    cos.dtype(),
                    positions.as<int32_t>(),
                    tables.as<int32_t>(),
                    running.as<bool>(),
                    inv_freq.as<float>(),
                    rope_scaling,
                    rows.as<int32_t>(),
                    splits.as<int32_t>(),
                    split,
                    lengths.as<int32_t>(),
                    n_splits.as<int32_t>(),
                    slots.as<int64_t>(),
                    cos.data(),
                    sin.data()};
  run(0, [a] { begin_step(a); });
}

void py_attention(py::handle q_, py::handle k_pages_, py::handle v_pages_, py::handle rows_, py::handle pages_,
                  py::handle splits_, py::handle layers_, py::handle count_, py::handle starts_, py::handle lengths_,
                  py::handle n_splits_, int64_t n_partials, float scale, int64_t layer, py::handle out_) {
  const Tensor q("q", q_, Kind::floating), k_pages("k_pages", k_pages_, Kind::floating),
      v_pages("v_pages", v_pages_, Kind::floating), rows("rows", rows_, Kind::i32), pages("pages", pages_, Kind::i32),
      splits("splits", splits_, Kind::i32), layers("layers", layers_, Kind::i32), count("count", count_, Kind::i32),
      starts("starts", starts_, Kind::i32), lengths("lengths", lengths_, Kind::i32),
      n_splits("n_splits", n_splits_, Kind::i32), out("out", out_, Kind::floating);
  q.shaped({-1, -1, -1}).dense(1);
  const int64_t batch = q.dim(0), heads = q.dim(1), d = q.dim(2);
  k_pages.shaped({-1, -1, -1, d}).dense().like(q);
  const int64_t page_size = k_pages.dim(1), kv_heads = k_pages.dim(2);
  v_pages.shaped({k_pages.dim(0), page_size, kv_heads, d}).dense().like(q);
  if (d < 1 || page_size < 1) throw py::value_error("pages and heads must not be empty");
  if (kv_heads < 1 || heads % kv_heads)
    throw py::value_error(std::to_string(heads) + " query heads are not a multiple of " + std::to_string(kv_heads) +
                          " KV heads");
  rows.shaped({-1, -1}).dense(1);
  const int64_t places = rows.dim(0);
  pages.shaped({places, -1}).dense(1);
  splits.shaped({places}).dense();
  layers.shaped({places, 2}).dense();
  count.shaped({1}).dense();
  starts.shaped({batch}).dense();
  lengths.shaped({places}).dense();
  n_splits.shaped({batch}).dense();
  out.shaped({batch, heads * d}).dense().like(q);
  const int64_t n = std::clamp<int64_t>(count.as<int32_t>()[0], 0, places);
  within<int32_t>(rows, n, -1, batch);
  within<int32_t>(pages, n, 0, k_pages.dim(0));
  within<int32_t>(lengths, n, 0, pages.dim(1) * page_size + 1);
  within<int32_t>(splits, n, 0, n_partials + 1);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t first = starts.as<int32_t>()[row], parts = n_splits.as<int32_t>()[row];
    if (parts == 0) continue;
    if (first < 0 || parts < 0 || first + parts > n_partials)
      throw py::index_error("row " + std::to_string(row) + " has parts [" + std::to_string(first) + ", " +
                            std::to_string(first + parts) + "), and there are " + std::to_string(n_partials));
  }
  out.apart({&q, &k_pages, &v_pages, &rows, &pages, &splits, &layers, &count, &starts, &lengths, &n_splits});
  int64_t positions = 0;
  for (int64_t i = 0; i < n; ++i) positions += lengths.as<int32_t>()[i];
  const Attention a{batch,
                    heads,
                    kv_heads,
                    d,
                    page_size,
                    q.dtype(),
                    q.data(),
                    q.stride(0),
                    k_pages.data(),
                    v_pages.data(),
                    n,
                    rows.dim(1),
                    rows.stride(0),
                    pages.stride(0),
                    rows.as<int32_t>(),
                    pages.as<int32_t>(),
                    splits.as<int32_t>(),
                    layers.as<int32_t>(),
                    starts.as<int32_t>(),
                    lengths.as<int32_t>(),
                    n_splits.as<int32_t>(),
                    scale,
                    layer,
                    out.data()};
  run(positions * kv_heads * d * (1 + rows.dim(1) * heads / kv_heads),
      [a, of = kernels] { of->grouped_decode_attention(a); });
}

void py_silu_mul(py::handle gate_up_, py::handle out_) {
  const Tensor gate_up("gate_up", gate_up_, Kind::floating), out("out", out_, Kind::floating);
  gate_up.shaped({-1, -1}).dense(1);
  if (gate_up.dim(1) % 2)
    throw py::value_error("gate_up must have an even width, not " + std::to_string(gate_up.dim(1)));
  const int64_t rows = gate_up.dim(0), width = gate_up.dim(1) / 2;
  out.shaped({rows, width}).dense().like(gate_up);
  out.apart({&gate_up});
  const SiluMul a{rows, width, out.dtype(), gate_up.data(), gate_up.stride(0), out.data()};
  run(rows * width * 8, [a, of = kernels] { of->silu_mul(a); });
}

void py_linear(py::handle x_, py::handle weight_, py::handle bias_, py::handle y_) {
  const Tensor x("x", x_, Kind::floating), weight("weight", weight_, Kind::floating), y("y", y_, Kind::floating);
  const Tensor bias = optional("bias", bias_, Kind::floating);
  x.shaped({-1, -1}).dense(1);
  const int64_t rows = x.dim(0), in = x.dim(1);
  weight.shaped({-1, in}).dense().like(x);
  const int64_t out = weight.dim(0);
  if (bias) bias.shaped({out}).dense().like(x);
  y.shaped({rows, out}).dense().like(x);
  y.apart({&x, &weight, &bias});
  const Linear a{rows, in, out, x.dtype(), x.data(), weight.data(), bias.as<void>(), x.stride(0), y.data()};
  run(rows * in * out / 4, [a, of = kernels] { of->linear(a); });
}

void py_sample(py::handle logits, py::handle sampled, py::handle seeds, py::handle temperature, py::handle top_k,
               py::handle top_p, py::handle min_p, py::handle penalty, py::handle seen, py::handle eos,
               py::handle min_tokens, py::handle budget, py::handle tokens, py::handle positions, py::handle generated,
               py::handle running, py::handle logprobs) {
  const SampleTensors t({logits, sampled, seeds, temperature, top_k, top_p, min_p, penalty, seen, eos, min_tokens,
                         budget, tokens, positions, generated, running, logprobs},
                        kDLCPU, int64_t{1} << 23, "2**23");
  within<int32_t>(t.eos, t.rows(), -1, t.vocab());
  t.apart();
  run(t.rows() * t.vocab() * 16, [a = t.arguments(), of = kernels] { of->sample(a); });
}

py::tuple py_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const Words words = philox(c0, c1, c2, c3, k0, k1);
  return py::make_tuple(words.x[0], words.x[1], words.x[2], words.x[3]);
}

}  // namespace
}  // namespace icon2

PYBIND11_MODULE(_native, m) {
  using namespace icon2;
  kernels = best();
  m.attr("build") = ICON2_BUILD;
  m.attr("interface") = kInterface;
  m.def("use_exchange", &use_exchange, "How torch lends its tensors: its __dlpack_c_exchange_api__.");
  m.def("use_openmp", &use_openmp, "Find the OpenMP runtime of this process, one below this folder first.");
  m.def("openmp_path", &openmp_path);
  m.def("max_threads", &max_threads);
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return kernels->name; });
  m.def("use_instruction_set", &use_instruction_set);
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("begin", &Program::begin)
      .def("end", &Program::end)
      .def("repeat", &Program::repeat)
      .def("__len__", &Program::size)
      .def_static("spoil", &Program::spoil);
  m.def("philox", &py_philox);
  m.def("embed", &py_embed);
  m.def("add_steer_rmsnorm", &py_add_steer_rmsnorm);
  m.def("rope_append", &py_rope_append);
  m.def("begin_step", &py_begin_step);
  m.def("grouped_decode_attention", &py_attention);
  m.def("silu_mul", &py_silu_mul);
  m.def("linear", &py_linear);
  m.def("sample", &py_sample);
#ifdef __GNUC__
  if (bind_cuda != nullptr) bind_cuda(m);
#endif
}
