// The shared headers and the CPU kernels under the sanitizers: every buffer is exactly as large as it is said to be,
// the shapes are odd, and threads are plain ones, which ThreadSanitizer understands (it does not know OpenMP's).
// tests/test_native_sanitizers.py builds and runs this. What the kernels compute is tested against the references in
// tests/test_native.py; here it only has to be finite, equal for one thread and several, and written in its place.
#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/begin_step.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "shared/philox.h"
#include "shared/select.h"
#include "shared/softmax.h"
#include "shared/steering.h"
#include "test/checking.h"

namespace icon2 {

static int threads_in_use = 1;

void run_parallel(int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* data) {
  std::vector<std::thread> threads;
  const int64_t team = threads_in_use;
  for (int64_t t = 0; t < team; ++t) {
    const int64_t begin = n * t / team, end = n * (t + 1) / team;
    if (begin < end) threads.emplace_back(body, data, begin, end);
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace icon2

using namespace icon2;

namespace {

int below(int n) { return static_cast<int>(rng()() % static_cast<unsigned>(n)); }

template <class T>
std::vector<T> blank(int64_t n) {
  return std::vector<T>(static_cast<size_t>(n));
}

template <class T>
bool finite(const std::vector<T>& v) {
  return std::all_of(v.begin(), v.end(), [](T x) { return std::isfinite(to_float(x)); });
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// f(results) once with one thread and once with three: the same bytes.
template <class T, class F>
std::vector<T> with_threads(int64_t n, F f) {
  std::vector<T> one = blank<T>(n), three = blank<T>(n);
  threads_in_use = 1;
  f(one);
  threads_in_use = 3;
  f(three);
  CHECK(same(one, three));
  CHECK(finite(one));
  return one;
}

template <class T>
DType dtype_of();
template <>
DType dtype_of<float>() {
  return DType::f32;
}
template <>
DType dtype_of<bf16>() {
  return DType::bf16;
}
template <>
DType dtype_of<f16>() {
  return DType::f16;
}

void check_conversions() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const f16 h{static_cast<uint16_t>(bits)};
    const bf16 b{static_cast<uint16_t>(bits)};
    if ((bits & 0x7C00u) != 0x7C00u || (bits & 0x3FFu) == 0) CHECK(from_float<f16>(to_float(h)).bits == bits);
    if ((bits & 0x7F80u) != 0x7F80u || (bits & 0x7Fu) == 0) CHECK(from_float<bf16>(to_float(b)).bits == bits);
  }
  CHECK(std::isnan(to_float(from_float<f16>(NAN))) && std::isnan(to_float(from_float<bf16>(NAN))));
  CHECK(from_float<f16>(65519.0f).bits == 0x7BFF && from_float<f16>(65520.0f).bits == 0x7C00);
  CHECK(from_float<f16>(5.9604645e-8f).bits == 1 && from_float<f16>(2.9e-8f).bits == 0);
}

void check_shared() {
  CHECK(coefficient(1.0f, -1.0f, 0.25f) == 0.75f);
  CHECK(keep_norm_scale(2.0f, 4.0f) == 0.5f && keep_norm_scale(0.0f, 4.0f) == 1.0f &&
        keep_norm_scale(2.0f, 0.0f) == 1.0f);
  const auto exp1 = [](float x) { return std::exp(x); };
  CHECK(part_weight({-INFINITY, 0.0f}, -INFINITY, exp1) == 0.0f && part_weight({1.0f, 2.0f}, 1.0f, exp1) == 1.0f);
  CHECK(inverse_mass(0.0f) == 0.0f && inverse_mass(4.0f) == 0.25f);
  CHECK(philox(0, 0, 0, 0, 0, 0).x[0] == 0x6627E8D5u);
  CHECK(uniform(0) > 0.0 && uniform(0xFFFFFFFFu) < 1.0);

  // Keys have the order of the scores, and give them back; the radix thresholds are those of a sort.
  for (int n : {1, 2, 300, 5000}) {
    std::vector<float> scores = normals<float>(n);
    for (int i = 0; i + 3 < n; i += 3) scores[static_cast<size_t>(i)] = scores[static_cast<size_t>(i) + 1];
    std::vector<float> sorted = scores;
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 1; i < sorted.size(); ++i)
      CHECK((sorted[i - 1] < sorted[i]) == (ordered_key(bits_of(sorted[i - 1])) < ordered_key(bits_of(sorted[i]))));
    for (float x : scores) CHECK(float_of(key_bits(ordered_key(bits_of(x)))) == x);
    std::vector<uint64_t> masses;
    uint64_t total = 0;
    for (float x : sorted) total += masses.emplace_back(fixed_mass(std::exp(x - sorted.back())));
    const int k = 1 + below(n);
    const float p = 0.7f;
    uint64_t so_far = 0;
    size_t last = 0;
    while (last + 1 < sorted.size() && (so_far += masses[last]) <= droppable(total, p)) ++last;
    uint32_t at_k = 0, at_p = 0;
    uint64_t rest_k = static_cast<uint64_t>(k), rest_p = droppable(total, p);
    for (int pass = 0; pass < kPasses; ++pass) {
      uint64_t counts[kBins] = {}, mass[kBins] = {};
      for (size_t i = 0; i < sorted.size(); ++i) {
        const uint32_t key = ordered_key(bits_of(sorted[i]));
        if (decided(key, at_k, pass)) ++counts[digit(key, pass)];
        if (decided(key, at_p, pass)) mass[digit(key, pass)] += masses[i];
      }
      const Pick a = pick_from_top(counts, rest_k), b = pick_from_bottom(mass, rest_p);
      at_k |= static_cast<uint32_t>(a.bin) << (24 - 8 * pass);
      at_p |= static_cast<uint32_t>(b.bin) << (24 - 8 * pass);
      rest_k = a.rest;
      rest_p = b.rest;
    }
    CHECK(float_of(key_bits(at_k)) == sorted[sorted.size() - static_cast<size_t>(k)]);
    CHECK(float_of(key_bits(at_p)) == sorted[last]);
  }
}

template <class T, class R>
void check_steering(const Kernels& kernels) {
  for (int64_t hidden : {1, 8, 31, 130}) {
    const int64_t rows = 5, layers = 2, terms = 3, bank_size = 4;
    const auto x = normals<T>(rows * (hidden + 3)), weight = normals<T>(hidden);
    const auto residual = normals<R>(rows * hidden);
    const auto bank = normals<float>(bank_size * layers * hidden), alpha = normals<float>(2 * layers * terms),
               beta = normals<float>(2 * layers * terms);
    const std::vector<int32_t> count{3, 0, 1, 2}, which{0, -1, 1, 0, 1};
    std::vector<int32_t> index(static_cast<size_t>(2 * layers * terms));
    for (int32_t& i : index) i = below(bank_size);
    const auto keep_norm = std::make_unique<bool[]>(2);
    keep_norm[1] = true;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const auto normed = with_threads<T>(rows * hidden, [&](std::vector<T>& result) {
        auto out = blank<R>(rows * hidden);
        auto measured = blank<float>(rows * (1 + terms));
        AddSteerRmsnorm a{};
        a.rows = rows, a.hidden = hidden, a.dtype = dtype_of<T>(), a.residual_dtype = dtype_of<R>();
        a.x = x.data(), a.x_stride = hidden + 3 - 3 * (hidden == 8);
        a.residual = residual.data(), a.residual_stride = hidden, a.weight = weight.data(), a.eps = 1e-6f;
        a.n_layers = layers, a.terms = terms, a.layer = layer, a.bank = bank.data(), a.count = count.data();
        a.index = index.data(), a.alpha = alpha.data(), a.beta = beta.data(), a.keep_norm = keep_norm.get();
        a.which = which.data(), a.measured = measured.data(), a.out = out.data(), a.normed = result.data();
        kernels.add_steer_rmsnorm(a);
        CHECK(finite(out) && finite(measured));
      });
    }
  }
}

template <class T>
void check_rope(const Kernels& kernels) {
  for (int64_t d : {2, 8, 34, 80}) {
    const int64_t rows = 4, heads = 3, kv = 1, width = (heads + 2 * kv) * d;
    const auto qkv = normals<T>(rows * width), cos = normals<T>(rows * d), sin = normals<T>(rows * d),
               norm = normals<T>(d);
    const std::vector<int64_t> slots{5, -1, 0, 3};
    with_threads<T>(rows * heads * d, [&](std::vector<T>& q) {
      auto k = blank<T>(6 * kv * d), v = blank<T>(6 * kv * d);
      kernels.rope_append({rows, heads, kv, d, dtype_of<T>(), qkv.data(), width, cos.data(), sin.data(), norm.data(),
                           norm.data(), 1e-6f, k.data(), v.data(), slots.data(), q.data()});
      CHECK(finite(k) && finite(v));
    });
  }
}

template <class T>
void check_attention(const Kernels& kernels) {
  for (int64_t d : {8, 34, 128}) {
    // Two rows share splits 0 and 1; a third is alone; a fourth does not run. Splits of 3 pages of 4 tokens.
    const int64_t batch = 4, heads = 6, kv = 2, page = 4, split = 12, n = 5;
    const std::vector<int32_t> rows{0, 1, 0, 1, 0, -1, 1, -1, 2, -1}, splits{0, 1, 2, 2, 0}, starts{0, 3, 6, 9},
        positions{30, 27, 5, 40};
    const std::vector<int32_t> pages{0, 1, 2, 3, 4, 5, 6, 7, 0, 8, 9, 0, 10, 11, 0};
    const std::vector<int32_t> layers{0, 9, 0, 9, 0, 9, 0, 9, 0, 9};
    const std::vector<int32_t> tables(static_cast<size_t>(batch * 11), 1);
    const auto running = std::make_unique<bool[]>(4);
    running[0] = running[1] = running[2] = true;
    auto lengths = blank<int32_t>(n), n_splits = blank<int32_t>(batch);
    auto slots = blank<int64_t>(batch);
    auto cos = blank<T>(batch * d), sin = blank<T>(batch * d);
    const auto inv_freq = normals<float>(d / 2);
    begin_step({batch,
                11,
                page,
                d / 2,
                n,
                2,
                2,
                n,
                dtype_of<T>(),
                positions.data(),
                tables.data(),
                running.get(),
                inv_freq.data(),
                1.0f,
                rows.data(),
                splits.data(),
                split,
                lengths.data(),
                n_splits.data(),
                slots.data(),
                cos.data(),
                sin.data()});
    CHECK((lengths == std::vector<int32_t>{12, 12, 7, 4, 6}) && (n_splits == std::vector<int32_t>{3, 3, 1, 0}));
    CHECK(slots[0] == 4 + 2 && slots[3] == -1 && finite(cos) && finite(sin));
    const auto q = normals<T>(batch * heads * d);
    const auto k = normals<T>(12 * page * kv * d), v = normals<T>(12 * page * kv * d);
    const auto out = with_threads<T>(batch * heads * d, [&](std::vector<T>& result) {
      kernels.grouped_decode_attention({batch,
                                        heads,
                                        kv,
                                        d,
                                        page,
                                        dtype_of<T>(),
                                        q.data(),
                                        heads * d,
                                        k.data(),
                                        v.data(),
                                        n,
                                        2,
                                        2,
                                        3,
                                        rows.data(),
                                        pages.data(),
                                        splits.data(),
                                        layers.data(),
                                        starts.data(),
                                        lengths.data(),
                                        n_splits.data(),
                                        0.3f,
                                        4,
                                        result.data()});
    });
    for (int64_t i = 0; i < heads * d; ++i) CHECK(to_float(out[static_cast<size_t>(3 * heads * d + i)]) == 0.0f);
  }
}

template <class T>
void check_dense(const Kernels& kernels) {
  for (int64_t in : {1, 30, 64}) {
    for (int64_t rows : {1, 2, 3, 7}) {
      const int64_t out = 11;
      const auto x = normals<T>(rows * in), weight = normals<T>(out * in), bias = normals<T>(out);
      with_threads<T>(rows * out, [&](std::vector<T>& y) {
        kernels.linear({rows, in, out, dtype_of<T>(), x.data(), weight.data(), bias.data(), in, y.data()});
      });
      if (in % 2 == 0)
        with_threads<T>(rows * in / 2, [&](std::vector<T>& y) {
          kernels.silu_mul({rows, in / 2, dtype_of<T>(), x.data(), in, y.data()});
        });
    }
  }
}

template <class T>
void check_sample(const Kernels& kernels) {
  for (int64_t vocab : {1, 5, 300}) {
    const int64_t rows = 4;
    const auto logits = normals<T>(rows * vocab, 3.0f);
    const auto sampled = std::make_unique<bool[]>(4);
    sampled[0] = sampled[1] = sampled[2] = true;
    const std::vector<int64_t> seeds{1, 2, 3, 4, 5, 6, 0xFFFFFFFF, 0xFFFFFFFF};
    const std::vector<float> temperature{0.5f, 1.0f, 2.0f, 1.0f}, top_p{0.9f, 0.0f, 1.0f, 1.0f},
        min_p{0.0f, 0.1f, 0.9f, 0.0f}, penalty{1.0f, 1.3f, 0.5f, 1.2f};
    const std::vector<int32_t> top_k{1, 3, 10000, 7}, eos{0, -1, 0, -1, 0, -1, 0, -1}, early{9, 0, 9, 0},
        budget{9, 1, 9, 9};
    with_threads<float>(rows, [&](std::vector<float>& logprobs) {
      std::vector<int64_t> tokens(4);
      std::vector<int32_t> positions(4), generated(4);
      const auto running = std::make_unique<bool[]>(4),
                 seen = std::make_unique<bool[]>(static_cast<size_t>(rows * vocab));
      running[0] = running[1] = running[3] = true;
      for (int step = 0; step < 3; ++step)
        kernels.sample({rows,
                        vocab,
                        2,
                        dtype_of<T>(),
                        logits.data(),
                        vocab,
                        sampled.get(),
                        seeds.data(),
                        temperature.data(),
                        top_k.data(),
                        top_p.data(),
                        min_p.data(),
                        penalty.data(),
                        seen.get(),
                        eos.data(),
                        early.data(),
                        budget.data(),
                        tokens.data(),
                        positions.data(),
                        generated.data(),
                        running.get(),
                        logprobs.data()});
      CHECK((vocab == 1 || generated[0] == 3) && generated[1] == 1 && !running[1] && generated[2] == 0);
      for (int64_t token : tokens) CHECK(token >= 0 && token < vocab);
    });
  }
}

template <class T>
void check(const Kernels& kernels) {
  check_steering<T, T>(kernels);
  check_steering<T, float>(kernels);
  check_rope<T>(kernels);
  check_attention<T>(kernels);
  check_dense<T>(kernels);
  check_sample<T>(kernels);
}

}  // namespace

int main() {
  check_conversions();
  check_shared();
  for (const Kernels* kernels : {&kPortable, avx2(), avx512()}) {
    if (kernels == nullptr) continue;
    check<float>(*kernels);
    check<bf16>(*kernels);
    check<f16>(*kernels);
    std::printf("%s\n", kernels->name);
  }
}
