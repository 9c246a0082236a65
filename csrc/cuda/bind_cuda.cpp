// The CUDA part of icon2_rt._native: as in bind.cpp, the checks and then the call. Indices lie in the device's memory
// and are not looked at; the kernels pass over those that are outside.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/kernels.h"
#include "tensor.h"

#ifndef ICON2_CUDA_BUILD  // setup.py says for which devices
#define ICON2_CUDA_BUILD ""
#endif

namespace icon2 {
namespace {

// What a launch says was wrong.
void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

cuda::Stream stream_of(const Tensor& on, std::initializer_list<const Tensor*> others, uintptr_t stream) {
  for (const Tensor* other : others)
    if (*other && other->device() != on.device())
      throw py::value_error(other->name() + " is on CUDA device " + std::to_string(other->device()) + " and " +
                            on.name() + " on " + std::to_string(on.device()) + ": they must be on one");
  return {on.device(), reinterpret_cast<void*>(stream)};  // NOLINT(performance-no-int-to-ptr): Python's is a number
}

void room(const Tensor& scratch, int64_t bytes) {
  scratch.shaped({-1}).dense();
  if (scratch.size() * 8 < bytes)
    throw py::value_error("scratch must have " + std::to_string((bytes + 7) / 8) + " elements, not " +
                          std::to_string(scratch.size()));
}

Tensor on_cuda(const char* name, py::handle object, Kind kind) { return {name, object, kind, kDLCUDA}; }

Tensor on_cuda_or_none(const char* name, py::handle object, Kind kind) {
  return object.is_none() ? Tensor() : on_cuda(name, object, kind);
}

void aligned(const Tensor& tensor, int64_t stride) {
  if (tensor.size() == 0) return;
  if (reinterpret_cast<uintptr_t>(tensor.data()) % 16 != 0 || (tensor.dim(0) > 1 && stride % 8 != 0))
    throw py::value_error("the rows of " + tensor.name() + " must begin at multiples of 16 bytes");
}

void py_sample(py::handle logits_, py::handle sampled_, py::handle seeds_, py::handle temperature_, py::handle top_k_,
               py::handle top_p_, py::handle min_p_, py::handle penalty_, py::handle seen_, py::handle eos_,
               py::handle min_tokens_, py::handle budget_, py::handle tokens_, py::handle positions_,
               py::handle generated_, py::handle running_, py::handle logprobs_, py::handle scratch_,
               uintptr_t stream_) {
  const Tensor logits = on_cuda("logits", logits_, Kind::floating), eos = on_cuda("eos", eos_, Kind::i32),
               budget = on_cuda("budget", budget_, Kind::i32), tokens = on_cuda("tokens", tokens_, Kind::i64),
               positions = on_cuda("positions", positions_, Kind::i32),
               generated = on_cuda("generated", generated_, Kind::i32),
               running = on_cuda("running", running_, Kind::boolean),
               logprobs = on_cuda("logprobs", logprobs_, Kind::f32), scratch = on_cuda("scratch", scratch_, Kind::i64);
  const Tensor sampled = on_cuda_or_none("sampled", sampled_, Kind::boolean),
               seeds = on_cuda_or_none("seeds", seeds_, Kind::i64),
               temperature = on_cuda_or_none("temperature", temperature_, Kind::f32),
               top_k = on_cuda_or_none("top_k", top_k_, Kind::i32), top_p = on_cuda_or_none("top_p", top_p_, Kind::f32),
               min_p = on_cuda_or_none("min_p", min_p_, Kind::f32),
               penalty = on_cuda_or_none("repetition_penalty", penalty_, Kind::f32),
               seen = on_cuda_or_none("seen", seen_, Kind::boolean),
               min_tokens = on_cuda_or_none("min_tokens", min_tokens_, Kind::i32);
  logits.shaped({-1, -1}).dense(1);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  if (vocab < 1 || vocab > cuda::kMostVocab)
    throw py::value_error("the vocabulary must have 1 to " + std::to_string(cuda::kMostVocab) + " entries, not " +
                          std::to_string(vocab));
  if (rows > 65535) throw py::value_error("there may be 65535 rows, not " + std::to_string(rows));
  for (const Tensor* t : {&budget, &tokens, &positions, &generated, &running, &logprobs, &sampled, &temperature, &top_k,
                          &top_p, &min_p, &penalty, &min_tokens})
    if (*t) t->shaped({rows}).dense();
  eos.shaped({rows, -1}).dense();
  if (seeds) seeds.shaped({rows, 2}).dense();
  if (seen) seen.shaped({rows, vocab}).dense();
  if (sampled && !seeds) throw py::value_error("rows that sample need seeds");
  if (penalty && !seen) throw py::value_error("repetition_penalty needs seen");
  room(scratch, cuda::sample_scratch(rows, vocab));
  for (const Tensor* written : {&tokens, &positions, &generated, &running, &logprobs, &seen, &scratch})
    written->apart({&logits, &eos, &budget, &tokens, &positions, &generated, &running, &logprobs, &sampled, &seeds,
                    &temperature, &top_k, &top_p, &min_p, &penalty, &seen, &min_tokens, &scratch});
  const cuda::Stream stream =
      stream_of(logits,
                {&eos, &budget, &tokens, &positions, &generated, &running, &logprobs, &sampled, &seeds, &temperature,
                 &top_k, &top_p, &min_p, &penalty, &seen, &min_tokens, &scratch},
                stream_);
  const Sample a{rows,
                 vocab,
                 eos.dim(1),
                 logits.dtype(),
                 logits.data(),
                 logits.stride(0),
                 sampled.as<bool>(),
                 seeds.as<int64_t>(),
                 temperature.as<float>(),
                 top_k.as<int32_t>(),
                 top_p.as<float>(),
                 min_p.as<float>(),
                 penalty.as<float>(),
                 seen.as<bool>(),
                 eos.as<int32_t>(),
                 min_tokens.as<int32_t>(),
                 budget.as<int32_t>(),
                 tokens.as<int64_t>(),
                 positions.as<int32_t>(),
                 generated.as<int32_t>(),
                 running.as<bool>(),
                 logprobs.as<float>()};
  check(cuda::sample(a, scratch.data(), stream));
}

void py_linear(py::handle x_, py::handle weight_, py::handle bias_, py::handle residual_, py::handle y_,
               py::handle scratch_, uintptr_t stream_) {
  const Tensor x = on_cuda("x", x_, Kind::floating), weight = on_cuda("weight", weight_, Kind::floating),
               y = on_cuda("y", y_, Kind::floating), scratch = on_cuda("scratch", scratch_, Kind::i64);
  const Tensor bias = on_cuda_or_none("bias", bias_, Kind::floating),
               residual = on_cuda_or_none("residual", residual_, Kind::floating);
  x.shaped({-1, -1}).dense(1);
  if (x.dtype() == DType::f32) throw py::type_error("x must be bfloat16 or float16, not float32");
  const int64_t rows = x.dim(0), in = x.dim(1);
  if (rows > cuda::kMostRows)
    throw py::value_error("x must have at most " + std::to_string(cuda::kMostRows) + " rows, not " +
                          std::to_string(rows));
  weight.shaped({-1, in}).dense().like(x);
  const int64_t out = weight.dim(0);
  if (in < 1 || in % 8 != 0 || in > int64_t{1} << 24 || out > int64_t{1} << 24)
    throw py::value_error("weight must have a multiple of 8 columns, and at most 2**24 rows and columns");
  if (bias) bias.shaped({out}).dense().like(x);
  if (residual) residual.shaped({rows, out}).dense().like(x);
  y.shaped({rows, out}).dense().like(x);
  aligned(x, x.stride(0));
  aligned(weight, in);
  room(scratch, cuda::kLinearScratch);
  y.apart({&x, &weight, &bias, &residual, &scratch});
  scratch.apart({&x, &weight, &bias, &residual});
  const cuda::Stream stream = stream_of(x, {&weight, &bias, &residual, &y, &scratch}, stream_);
  const Linear a{rows, in, out, x.dtype(), x.data(), weight.data(), bias.as<void>(), x.stride(0), y.data()};
  check(cuda::linear({a, residual.as<void>(), scratch.data()}, stream));
}

py::object py_why_not(int device) {
  const char* error = cuda::why_not(device);
  return error == nullptr ? py::object(py::none()) : py::object(py::str(error));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("build") = "cpu+cuda (" ICON2_CUDA_BUILD ")";
  m.def("cuda_why_not", &py_why_not, "None where the CUDA kernels can run on this device, else why not.");
  m.def("cuda_sample_scratch", &cuda::sample_scratch, "Bytes that cuda_sample needs for (rows, vocabulary).");
  m.attr("cuda_linear_scratch") = cuda::kLinearScratch;
  m.def("cuda_sample", &py_sample);
  m.def("cuda_linear", &py_linear);
}

}  // namespace icon2
