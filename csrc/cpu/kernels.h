// The CPU kernels' arguments, and the table of one instruction set's kernels. Every pointer, size and index in them has
// been checked (bind.cpp) by the time a kernel sees it. Names, order and layout are those of icon2_rt/ops.
#pragma once

#include <cstdint>

#include "cpu/scalar.h"

namespace icon2 {

struct AddSteerRmsnorm {
  int64_t rows, hidden;
  DType dtype, residual_dtype;  // of x, weight and normed; of residual and out (the same, or f32)
  const void *x, *residual, *weight;
  int64_t x_stride, residual_stride;
  float eps;
  // steering; `which` null without it
  int64_t n_layers, terms, layer;
  const float* bank;
  const int32_t *count, *index;
  const float *alpha, *beta;
  const bool* keep_norm;
  const int32_t* which;
  float* measured;  // or null
  void *out, *normed;
};

struct RopeAppend {
  int64_t rows, heads, kv_heads, d;  // heads: of q
  DType dtype;
  const void* qkv;
  int64_t qkv_stride;
  const void *cos, *sin, *q_norm, *k_norm;
  float eps;
  void *k_pages, *v_pages;
  const int64_t* slots;
  void* q;
};

struct Attention {
  int64_t batch, heads, kv_heads, d, page_size;
  DType dtype;
  const void* q;
  int64_t q_stride;
  const void *k_pages, *v_pages;
  int64_t n, width, rows_stride, pages_stride;  // items, and the rows of each
  const int32_t *rows, *pages, *splits, *layers, *starts, *lengths, *n_splits;
  float scale;
  int64_t layer;
  void* out;
};

struct SiluMul {
  int64_t rows, width;
  DType dtype;
  const void* gate_up;
  int64_t stride;
  void* out;
};

struct Linear {
  int64_t rows, in, out;
  DType dtype;
  const void *x, *weight, *bias;  // bias or null
  int64_t x_stride;
  void* y;
};

struct Sample {
  int64_t rows, vocab, eos_width;
  DType dtype;
  const void* logits;
  int64_t stride;
  // each null where no row needs it
  const bool* sampled;
  const int64_t* seeds;
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *repetition_penalty;
  bool* seen;
  const int32_t *eos, *min_tokens, *budget;
  // state
  int64_t* tokens;
  int32_t *positions, *generated;
  bool* running;
  float* logprobs;
};

struct Kernels {
  const char* name;
  void (*add_steer_rmsnorm)(const AddSteerRmsnorm&);
  void (*rope_append)(const RopeAppend&);
  void (*grouped_decode_attention)(const Attention&);
  void (*silu_mul)(const SiluMul&);
  void (*linear)(const Linear&);
  void (*sample)(const Sample&);
};

extern const Kernels kPortable;
const Kernels* avx2();  // null where this build or this CPU has it not
const Kernels* avx512();

}  // namespace icon2
