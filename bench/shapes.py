"""Decoders of real sizes with random weights, made on the device: what the GPU benchmarks run, without a download.

What a step costs does not depend on the values, as long as they are random (a product of zeros is faster than one of
numbers) and stay finite.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from icon2_rt.models import DecoderSpec, DecoderWeights
from icon2_rt.models.decoder import decoder_of
from icon2_rt.trial import decoder

SEED = 0
STD = 0.02

# Sizes of the published configurations (the Llamas with room for prompts of 8192 tokens and what follows them); two
# small ones for a CPU, of which "-mha" has a KV head for every query head; and "dry", which has their kinds of size in
# little, for a run without a GPU.
SHAPES = {
    "llama3-8b": DecoderSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 16384, None, 1e-5, 1.0, False),
    "qwen2-7b": DecoderSpec("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, 32768, None, 1e-6, 1.0, False),
    "qwen2-1.5b": DecoderSpec("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 32768, None, 1e-6, 1.0, True),
    "llama2-7b": DecoderSpec("llama", 32, 4096, 32, 32, 128, 11008, 32000, 16384, None, 1e-5, 1.0, False),
    "llama3.2-3b": DecoderSpec("llama", 28, 3072, 24, 8, 128, 8192, 128256, 16384, None, 1e-5, 1.0, True),
    "llama3.2-1b": DecoderSpec("llama", 16, 2048, 32, 8, 64, 8192, 128256, 16384, None, 1e-5, 1.0, True),
    "random100m": DecoderSpec("llama", 12, 768, 12, 4, 64, 2048, 32000, 16384, None, 1e-6, 1.0, True),
    "random100m-mha": DecoderSpec("llama", 12, 768, 12, 12, 64, 2048, 32000, 16384, None, 1e-6, 1.0, True),
    "dry": DecoderSpec("llama", 3, 48, 6, 2, 8, 80, 128, 512, None, 1e-5, 1.0, False),
}
_ROPE_THETA = {"llama3-8b": 5e5, "llama3.2-3b": 5e5, "llama3.2-1b": 5e5, "qwen2-7b": 1e6, "qwen2-1.5b": 1e6}
_USUAL_THETA = 1e4


def random_weights(name: str, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
    """The decoder's tensors in the runtime's own layout, drawn in place on ``device``."""
    theta = _ROPE_THETA.get(name, _USUAL_THETA)
    return decoder.random_weights(SHAPES[name], device, dtype, seed=SEED, std=STD, rope_theta=theta)


def transformers_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same sizes as a transformers model: built without memory, then filled on ``device``, which takes a second
    where its own initialisation takes minutes. Without an end-of-sequence token."""
    with torch.device("meta"):
        model = _model_class(name)(config(name, dtype))
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            mean, std = (1.0, 0.1) if "norm" in parameter_name else (0.0, STD)
            parameter.normal_(mean, std, generator=generator)
    base = decoder_of(model)
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)  # its buffers were empty too
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def config(name: str, dtype: torch.dtype) -> PretrainedConfig:
    """transformers' configuration of the same sizes."""
    spec = SHAPES[name]
    config_class = Qwen2Config if spec.family == "qwen2" else LlamaConfig
    return config_class(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position,
        rms_norm_eps=spec.rms_norm_eps,
        tie_word_embeddings=spec.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA.get(name, _USUAL_THETA)},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )


def _model_class(name: str) -> type[PreTrainedModel]:
    return Qwen2ForCausalLM if SHAPES[name].family == "qwen2" else LlamaForCausalLM


def step_weights(spec: DecoderSpec) -> int:
    """Elements that one decode step reads of the weights: all but the embedding, of which it takes a row a token."""
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    heads = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    block = heads * hidden + spec.n_heads * spec.head_dim * hidden + 3 * ffn * hidden
    return spec.n_layers * block + spec.vocab_size * hidden


def all_weights(spec: DecoderSpec) -> int:
    """Elements of all weights but norms and biases."""
    return step_weights(spec) + (0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size)
