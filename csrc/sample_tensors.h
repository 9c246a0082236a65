// The tensors of ops.sample, of the CPU or of a CUDA device: their checks, as far as they need no look into the memory,
// and the kernel's arguments.
#pragma once

#include <array>
#include <string>

#include "cpu/kernels.h"
#include "tensor.h"

namespace icon2 {

struct SampleTensors {
  // In the order in which the bound functions take them.
  Tensor logits, sampled, seeds, temperature, top_k, top_p, min_p, penalty, seen, eos, min_tokens, budget, tokens,
      positions, generated, running, logprobs;

  using Handles = std::array<py::handle, 17>;

  SampleTensors(const Handles& h, int32_t device_type, int64_t most_vocab, const char* most_in_words)
      : logits("logits", h[0], Kind::floating, device_type),
        sampled(optional("sampled", h[1], Kind::boolean, device_type)),
        seeds(optional("seeds", h[2], Kind::i64, device_type)),
        temperature(optional("temperature", h[3], Kind::f32, device_type)),
        top_k(optional("top_k", h[4], Kind::i32, device_type)),
        top_p(optional("top_p", h[5], Kind::f32, device_type)),
        min_p(optional("min_p", h[6], Kind::f32, device_type)),
        penalty(optional("repetition_penalty", h[7], Kind::f32, device_type)),
        seen(optional("seen", h[8], Kind::boolean, device_type)),
        eos("eos", h[9], Kind::i32, device_type),
        min_tokens(optional("min_tokens", h[10], Kind::i32, device_type)),
        budget("budget", h[11], Kind::i32, device_type),
        tokens("tokens", h[12], Kind::i64, device_type),
        positions("positions", h[13], Kind::i32, device_type),
        generated("generated", h[14], Kind::i32, device_type),
        running("running", h[15], Kind::boolean, device_type),
        logprobs("logprobs", h[16], Kind::f32, device_type) {
    logits.shaped({-1, -1}).dense(1);
    if (vocab() < 1 || vocab() > most_vocab)
      throw py::value_error(std::string("the vocabulary must have 1 to ") + most_in_words + " entries, not " +
                            std::to_string(vocab()));
    for (const Tensor* t : {&budget, &tokens, &positions, &generated, &running, &logprobs, &sampled, &temperature,
                            &top_k, &top_p, &min_p, &penalty, &min_tokens})
      if (*t) t->shaped({rows()}).dense();
    eos.shaped({rows(), -1}).dense();
    if (seeds) seeds.shaped({rows(), 2}).dense();
    if (seen) seen.shaped({rows(), vocab()}).dense();
    if (sampled && !seeds) throw py::value_error("rows that sample need seeds");
    if (penalty && !seen) throw py::value_error("repetition_penalty needs seen");
  }

  int64_t rows() const { return logits.dim(0); }
  int64_t vocab() const { return logits.dim(1); }

  std::array<const Tensor*, 17> all() const {
    return {&logits, &sampled,    &seeds,  &temperature, &top_k,     &top_p,     &min_p,   &penalty, &seen,
            &eos,    &min_tokens, &budget, &tokens,      &positions, &generated, &running, &logprobs};
  }

  // What is written shares no byte with anything else; nor does `scratch`, if there is any.
  void apart(const Tensor& scratch = Tensor()) const {
    for (const Tensor* written : {&tokens, &positions, &generated, &running, &logprobs, &seen, &scratch})
      for (const Tensor* other : all()) written->apart({other, &scratch});
  }

  Sample arguments() const {
    return {rows(),
            vocab(),
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
  }
};

}  // namespace icon2
