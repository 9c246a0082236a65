// The CUDA kernels on the emulator under the sanitizers: every buffer is exactly as large as it is said to be, shapes
// are odd, and two runs, in which threads and blocks take turns differently, must give the same bytes. What the kernels
// compute is tested against the references in tests/test_native_cuda.py, which builds and runs this too.
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/kernels.h"
#include "test/checking.h"
#include "test/emulate.h"

using namespace icon2;

namespace {

// std::vector<bool> has no pointer.
struct Flags {
  explicit Flags(int64_t n, bool value) : memory(new bool[static_cast<size_t>(n)]) {
    std::fill_n(memory.get(), n, value);
  }
  std::unique_ptr<bool[]> memory;
};

void check_sample(float spread, bool draws, int top_k, float top_p, float min_p) {
  const int64_t rows = 2, vocab = 2501, stride = vocab + 3;
  const std::vector<bf16> logits = normals<bf16>(stride * (rows - 1) + vocab, spread);
  const std::vector<int64_t> seeds{1, 2, 3, 4};
  const std::vector<float> temperature(2, 0.8f), p(2, top_p), least(2, min_p), penalty{1.0f, 1.2f};
  const std::vector<int32_t> k(2, top_k), eos{3, -1, 2500, 7}, early{9, 0}, budget(2, 100);
  const Flags sampled(rows, draws);
  std::vector<int64_t> found;
  std::vector<float> logprobs;
  for (int run = 0; run < 2; ++run) {
    Flags seen(rows * vocab, false), running(rows, true);
    for (int64_t i = 0; i < rows * vocab; i += 3) seen.memory[static_cast<size_t>(i)] = true;
    std::vector<int64_t> tokens(2, -1);
    std::vector<int32_t> positions(2, 5), generated(2, 5);
    std::vector<float> logprob(2, NAN);
    std::vector<double> scratch(static_cast<size_t>((cuda::sample_scratch(rows, vocab) + 7) / 8), NAN);
    const Sample a{rows,
                   vocab,
                   2,
                   DType::bf16,
                   logits.data(),
                   stride,
                   sampled.memory.get(),
                   seeds.data(),
                   temperature.data(),
                   k.data(),
                   p.data(),
                   least.data(),
                   penalty.data(),
                   seen.memory.get(),
                   eos.data(),
                   early.data(),
                   budget.data(),
                   tokens.data(),
                   positions.data(),
                   generated.data(),
                   running.memory.get(),
                   logprob.data()};
    CHECK(cuda::sample(a, scratch.data(), {}) == nullptr);
    for (size_t row = 0; row < 2; ++row) {
      CHECK(tokens[row] >= 0 && tokens[row] < vocab && std::isfinite(logprob[row]));
      CHECK(positions[row] == 6 && generated[row] == 6);
    }
    CHECK(run == 0 || (found == tokens && logprobs == logprob));
    found = tokens;
    logprobs = logprob;
  }
}

template <class T>
void check_linear(DType dtype, int64_t rows, int64_t in, int64_t out) {
  const int64_t stride = in + 8;
  const std::vector<T> x = normals<T>(stride * (rows - 1) + in), weight = normals<T>(in * out), bias = normals<T>(out),
                       residual = normals<T>(rows * out);
  std::vector<T> first;
  std::vector<double> scratch(static_cast<size_t>(cuda::kLinearScratch / 8), 0.0);
  for (int run = 0; run < 2; ++run) {
    std::vector<T> y(static_cast<size_t>(rows * out), from_float<T>(NAN));
    const Linear a{rows, in, out, dtype, x.data(), weight.data(), bias.data(), stride, y.data()};
    CHECK(cuda::linear({a, residual.data(), scratch.data()}, {}) == nullptr);
    for (int64_t i = 0; i < rows * out; ++i) {
      const int64_t row = i / out, column = i % out;
      double sum = to_float(bias[static_cast<size_t>(column)]) + to_float(residual[static_cast<size_t>(i)]);
      for (int64_t k = 0; k < in; ++k)
        sum += static_cast<double>(to_float(x[static_cast<size_t>(row * stride + k)])) *
               static_cast<double>(to_float(weight[static_cast<size_t>(column * in + k)]));
      const double mine = to_float(y[static_cast<size_t>(i)]);
      CHECK(std::fabs(mine - sum) <= 0.02 * (std::fabs(sum) + 1.0));
    }
    CHECK(run == 0 || std::memcmp(first.data(), y.data(), y.size() * sizeof(T)) == 0);
    first = y;
  }
}

}  // namespace

// Lane 0 of another warp reads what nobody has waited for.
__global__ void planted_race(int* out) {
  int& value = shared_memory<int>();
  if (threadIdx.x == 0) value = 1;
  if (threadIdx.x == 32) *out = value;
}

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "planted") == 0) {
    int out = 0;
    cuda::launch(planted_race, 1, 1, 64, sizeof(int), {}, &out);
    return 0;
  }
  const int all = 1 << 30;
  check_sample(2.0f, false, all, 1.0f, 0.0f);
  check_sample(2.0f, true, all, 1.0f, 0.0f);
  check_sample(4.0f, true, 20, 0.9f, 0.01f);  // among few candidates
  check_sample(0.2f, true, all, 0.9f, 0.0f);  // over the whole row
  check_linear<bf16>(DType::bf16, 3, 136, 65);
  check_linear<f16>(DType::f16, 9, 1032, 70);
  std::puts("all good");
  return 0;
}
