"""Random small transformers models and a small tokenizer: what the engine's tests compare against, made in memory.

Every builder is seeded by its arguments, so that calling it twice gives two models with the same weights: one for the
runtime (which takes the weights over) and one for the oracle. Weights are drawn much wider than a default
initialisation: with std 0.02 every layer is nearly linear and greedy decoding falls into a constant loop, which hides
nearly every mistake. Norm weights and biases are random too, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 128  # a few more than the tokenizer knows, as in Qwen: such ids are valid tokens without text

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def randomize(model: PreTrainedModel, seed: int, std: float) -> PreTrainedModel:
    """Draw every parameter anew, in the order of ``named_parameters`` (tied ones once)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(std * noise)
    return model.eval().requires_grad_(False)


def _build(config_class: type, model_class: type, seed: int, std: float, overrides: dict[str, Any]) -> PreTrainedModel:
    model = model_class(config_class(**{**_COMMON, **overrides}))
    randomize(model, seed, std)
    model.generation_config.eos_token_id = model.config.eos_token_id
    return model


def tiny_llama(*, seed: int = 0, std: float = 0.25, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama: hidden 48, 4 blocks, 6 query and 2 KV heads of 8, vocabulary 128, fp32."""
    return _build(LlamaConfig, LlamaForCausalLM, seed, std, overrides)


def tiny_mistral(*, seed: int = 0, std: float = 0.25, **overrides: Any) -> MistralForCausalLM:
    """A random Mistral without a sliding window, heads of 16 (not hidden / heads)."""
    return _build(MistralConfig, MistralForCausalLM, seed, std, {"sliding_window": None, "head_dim": 16, **overrides})


def tiny_qwen2(*, seed: int = 0, std: float = 0.25, **overrides: Any) -> Qwen2ForCausalLM:
    """A random Qwen2/2.5: biases on q, k and v."""
    return _build(Qwen2Config, Qwen2ForCausalLM, seed, std, overrides)


def tiny_qwen3(*, seed: int = 0, std: float = 0.25, **overrides: Any) -> Qwen3ForCausalLM:
    """A random Qwen3: q/k norm, heads of 16 (not hidden / heads), tied embeddings."""
    return _build(Qwen3Config, Qwen3ForCausalLM, seed, std, {"head_dim": 16, "tie_word_embeddings": True, **overrides})


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama-mha": lambda: tiny_llama(num_key_value_heads=6),
    "llama-mqa-head16": lambda: tiny_llama(num_key_value_heads=1, head_dim=16),
    "llama3-rope-tied": lambda: tiny_llama(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-yarn": lambda: tiny_llama(rope_parameters=YARN_ROPE),
    "llama-linear-rope": lambda: tiny_llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama-theta-5e5": lambda: tiny_llama(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-5
    ),
    "mistral-head16": tiny_mistral,
    "qwen2-bias": tiny_qwen2,
    "qwen2-bias-tied": lambda: tiny_qwen2(
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "qwen3-qknorm-tied": tiny_qwen3,
    "qwen3-mha-untied": lambda: tiny_qwen3(num_key_value_heads=6, tie_word_embeddings=False, head_dim=8),
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("in", "g"),
    ("e", "r"),
    ("a", "n"),
    ("o", "n"),
    (" ", "the"),
    ("r", "e"),
]


def with_marks(core: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    """``core`` as a transformers tokenizer, with the special tokens of the tests' models and chat templates."""
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Printable characters, nine merges, five special tokens and a chat template; decoding is concatenation."""
    characters = ["\n", *(chr(c) for c in range(32, 127))]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters, *(a + b for a, b in _MERGES)])}
    assert len(vocab) <= VOCAB
    core = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    core.decoder = decoders.Fuse()
    return with_marks(core, CHAT_TEMPLATE)


def random_prompts(lengths: list[int], *, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Token ids of the given lengths, drawn uniformly."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def random_vectors(n_layers: int, hidden_size: int, *, seed: int) -> torch.Tensor:
    """``[n_layers, hidden_size]`` normal numbers: a direction with nothing special about it."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.randn(n_layers, hidden_size, generator=generator)
