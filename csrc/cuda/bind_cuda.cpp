// The CUDA part of icon2_rt._native: as in bind.cpp, the checks and then the call. Indices lie in the device's memory
// and are not looked at; the kernels pass over those that are outside.
#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "cuda/kernels.h"
#include "sample_tensors.h"

#ifndef ICON2_CUDA_BUILD  // setup.py says for which devices
#define ICON2_CUDA_BUILD ""
#endif

namespace icon2 {
namespace {

// What a launch says was wrong.
void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

template <class Others>
void on_one_device(const Tensor& on, const Others& others) {
  for (const Tensor* other : others)
    if (*other && other->device() != on.device())
      throw py::value_error(other->name() + " is on CUDA device " + std::to_string(other->device()) + " and " +
                            on.name() + " on " + std::to_string(on.device()) + ": they must be on one");
}

cuda::Stream stream_of(const Tensor& on, uintptr_t stream) {
  return {on.device(), reinterpret_cast<void*>(stream)};  // NOLINT(performance-no-int-to-ptr): Python's is a number
}

void room(const Tensor& scratch, int64_t bytes) {
  scratch.shaped({-1}).dense();
  if (scratch.size() * 8 < bytes)
    throw py::value_error("scratch must have " + std::to_string((bytes + 7) / 8) + " elements, not " +
                          std::to_string(scratch.size()));
}

void aligned(const Tensor& tensor, int64_t stride) {
  if (tensor.size() == 0) return;
  if (reinterpret_cast<uintptr_t>(tensor.data()) % 16 != 0 || (tensor.dim(0) > 1 && stride % 8 != 0))
    throw py::value_error("the rows of " + tensor.name() + " must begin at multiples of 16 bytes");
}

void py_sample(py::handle logits, py::handle sampled, py::handle seeds, py::handle temperature, py::handle top_k,
               py::handle top_p, py::handle min_p, py::handle penalty, py::handle seen, py::handle eos,
               py::handle min_tokens, py::handle budget, py::handle tokens, py::handle positions, py::handle generated,
               py::handle running, py::handle logprobs, py::handle scratch_, uintptr_t stream_) {
  const SampleTensors t({logits, sampled, seeds, temperature, top_k, top_p, min_p, penalty, seen, eos, min_tokens,
                         budget, tokens, positions, generated, running, logprobs},
                        kDLCUDA, cuda::kMostVocab, std::to_string(cuda::kMostVocab).c_str());
  const Tensor scratch("scratch", scratch_, Kind::i64, kDLCUDA);
  if (t.rows() > 65535) throw py::value_error("there may be 65535 rows, not " + std::to_string(t.rows()));
  room(scratch, cuda::sample_scratch(t.rows(), t.vocab()));
  t.apart(scratch);
  on_one_device(t.logits, t.all());
  on_one_device(t.logits, std::array<const Tensor*, 1>{&scratch});
  check(cuda::sample(t.arguments(), scratch.data(), stream_of(t.logits, stream_)));
}

void py_linear(py::handle x_, py::handle weight_, py::handle bias_, py::handle residual_, py::handle y_,
               py::handle scratch_, uintptr_t stream_) {
  const Tensor x("x", x_, Kind::floating, kDLCUDA), weight("weight", weight_, Kind::floating, kDLCUDA),
      y("y", y_, Kind::floating, kDLCUDA), scratch("scratch", scratch_, Kind::i64, kDLCUDA);
  const Tensor bias = optional("bias", bias_, Kind::floating, kDLCUDA),
               residual = optional("residual", residual_, Kind::floating, kDLCUDA);
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
  on_one_device(x, std::array<const Tensor*, 5>{&weight, &bias, &residual, &y, &scratch});
  const Linear a{rows, in, out, x.dtype(), x.data(), weight.data(), bias.as<void>(), x.stride(0), y.data()};
  check(cuda::linear({a, residual.as<void>(), scratch.data()}, stream_of(x, stream_)));
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
