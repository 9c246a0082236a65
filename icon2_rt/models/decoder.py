"""What a decoder is: its sizes, its weights as plain tensors, and how they are taken from a transformers model.

All supported families are one architecture (pre-norm, RMSNorm, rotary attention, SwiGLU) with a few switches, so a
family is a small declarative file beside this one and the code that runs them is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from icon2_rt.models.checkpoint import quantisation_method

# What a fingerprint hashes, and how many numbers of a tensor.
_FORM, _SAMPLED = "w2", 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rotary types whose frequencies do not depend on the length of the request, so that one table serves every row.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """What one family adds to the common decoder, in transformers' names.

    ``must_be`` lists config fields that may only have this value here (another one would change the computation).
    ``sliding_window`` returns the window in tokens, or None where every block attends to everything.
    """

    name: str
    architecture: str
    examples: str
    qkv_bias: bool = False
    qk_norm: bool = False
    must_be: Mapping[str, Any] | None = None
    sliding_window: Callable[[PretrainedConfig], int | None] = lambda config: None


@dataclass(frozen=True)
class DecoderSpec:
    """The sizes of a decoder; everything the engine needs to know that is not a tensor."""

    family: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    sliding_window: int | None
    rms_norm_eps: float
    rope_scaling: float
    tied_embeddings: bool

    @property
    def max_length(self) -> int:
        """Longest prompt + response (tokens) for which the model is what it was trained to be."""
        return min(self.max_position, self.sliding_window or self.max_position)


@dataclass
class LayerWeights:
    """One decoder block. Linear weights are ``[out, in]``; H, KV heads of size d, hidden D, feed-forward F."""

    input_norm: Tensor  # [D]
    qkv: Tensor  # [(H + 2·KV)·d, D]
    qkv_bias: Tensor | None  # [(H + 2·KV)·d]
    q_norm: Tensor | None  # [d]
    k_norm: Tensor | None  # [d]
    o: Tensor  # [D, H·d]
    post_norm: Tensor  # [D]
    gate_up: Tensor  # [2·F, D]
    down: Tensor  # [D, F]


@dataclass
class DecoderWeights:
    """All tensors of a decoder; ``lm_head`` is ``embedding`` itself where they are tied."""

    embedding: Tensor  # [vocab, D]
    layers: list[LayerWeights]
    final_norm: Tensor  # [D]
    lm_head: Tensor  # [vocab, D]
    inv_freq: Tensor  # [d / 2] fp32


def decoder_of(model: PreTrainedModel) -> Any:
    """transformers' module with the embedding, the blocks and the final norm (its attributes are untyped there)."""
    return model.base_model


def read_spec(model: PreTrainedModel, family: Family) -> DecoderSpec:
    """The sizes of ``model``, after every check that could make the result silently wrong.

    Raises:
        ValueError: a quantised or partly loaded model, or a config field whose value is not supported.
    """
    config = model.config
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        raise ValueError(
            "this model is empty: a Runtime has taken its weights over. Use that runtime, load the model again, or "
            "make the first one with keep_model=True"
        )
    _check_not_quantised(model)
    required = {"hidden_act": "silu", **(family.must_be or {})}
    wrong = {k: getattr(config, k) for k, v in required.items() if hasattr(config, k) and getattr(config, k) != v}
    if wrong:
        raise ValueError(
            f"this {family.name} checkpoint has {wrong}, only { ({k: required[k] for k in wrong}) } is supported"
        )
    rope = dict(config.rope_parameters)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported; supported are {list(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0")
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ValueError(
                f"weight {name} is on the meta device: load the model without offloading (device_map=None)"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"weight {name} is {tensor.dtype}; supported are float32, bfloat16 and float16")
    dtypes = sorted({str(tensor.dtype)[6:] for tensor in model.parameters()})
    if len(dtypes) > 1:
        raise ValueError(f"this model's weights are of several dtypes, {dtypes}: convert it, model.to(torch.bfloat16)")
    _check_parameters(model, family)
    if model.config.num_attention_heads % model.config.num_key_value_heads:
        raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
    return _sizes(model, family, _tied(model))


def spec_of_config(config: PretrainedConfig, family: Family) -> DecoderSpec:
    """The sizes of the model that ``config`` describes, without its weights. What :func:`read_spec` refuses in weights
    is not seen here, and of tied embeddings the config's word is taken."""
    with torch.device("meta"):
        return _sizes(AutoModelForCausalLM.from_config(config), family, bool(config.tie_word_embeddings))


def _sizes(model: PreTrainedModel, family: Family, tied: bool) -> DecoderSpec:
    config = model.config
    return DecoderSpec(
        family=family.name,
        n_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=_head(model).shape[0],
        max_position=config.max_position_embeddings,
        sliding_window=family.sliding_window(config),
        rms_norm_eps=config.rms_norm_eps,
        rope_scaling=float(decoder_of(model).rotary_emb.attention_scaling),
        tied_embeddings=tied,
    )


def _head(model: PreTrainedModel) -> nn.Parameter:
    return cast(nn.Parameter, model.get_output_embeddings().weight)


def _tied(model: PreTrainedModel) -> bool:
    """Is the head the embedding? The tensors decide, as in transformers: a trained head, or a merge, may differ from it
    under a config that says they are tied."""
    embedding, head = decoder_of(model).embed_tokens.weight, _head(model)
    if embedding.shape != head.shape:
        return False
    return embedding.data_ptr() == head.data_ptr() or (
        bool(model.config.tie_word_embeddings) and torch.equal(embedding, head.to(embedding.device))
    )


def _check_not_quantised(model: PreTrainedModel) -> None:
    """What the modules are decides: a model that was de-quantised keeps the config of its quantisation."""
    quantization_config = getattr(model.config, "quantization_config", None)
    if quantization_config is None:
        return
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        linear = name.endswith("_proj") or name == "lm_head"
        plain = isinstance(weight, nn.Parameter) and weight.dtype in _DTYPES and type(module) is nn.Linear
        if linear and not plain:
            raise ValueError(
                f"this model is quantised ({quantisation_method(quantization_config)}: {name} is a "
                f"{type(module).__name__}), and quantised weights are not supported: steering acts on the "
                f"full-precision residual stream. Load the original weights with dtype=float32, bfloat16 or float16, "
                f"or de-quantise the model first"
            )


def _check_parameters(model: PreTrainedModel, family: Family) -> None:
    """Refuse a model that computes with more than the family does: an adapter, a bias, a wrapped block."""
    parts = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    parts += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    parts += [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    parts += [f"self_attn.{name}_proj.bias" for name in "qkv" if family.qkv_bias]
    parts += [f"self_attn.{name}_norm.weight" for name in "qk" if family.qk_norm]
    base = decoder_of(model)
    expected = {
        "embed_tokens.weight",
        "norm.weight",
        *(f"layers.{i}.{p}" for i in range(len(base.layers)) for p in parts),
    }
    found = {name for name, _ in base.named_parameters()}
    found |= {f"lm_head.{name}" for name, _ in model.get_output_embeddings().named_parameters()} - {"lm_head.weight"}
    if found != expected:
        odd = sorted(found ^ expected)
        raise ValueError(
            f"this model's parameters are not those of a {family.name} decoder: {len(odd)} differ, {odd[:3]} …. "
            f"Merge an adapter into the weights first (model = model.merge_and_unload()), and unwrap what wraps a block"
        )


def take_weights(model: PreTrainedModel, family: Family, device: torch.device, keep_model: bool) -> DecoderWeights:
    """Move the weights out of ``model``, block by block, fusing q, k, v and gate, up.

    A block's originals are released before the next block is touched, so the peak is the weights and one block.
    With ``keep_model`` nothing is released and the memory is twice the weights.
    """
    base = decoder_of(model)

    def take(parameter: nn.Parameter) -> Tensor:
        tensor = parameter.detach().to(device)
        return tensor.clone() if keep_model and tensor.data_ptr() == parameter.data_ptr() else tensor

    def fuse(*modules: nn.Module, name: str = "weight") -> Tensor:
        return torch.cat([getattr(m, name).detach().to(device) for m in modules])

    def release(module: nn.Module) -> None:
        if not keep_model:
            for parameter in module.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    embedding = take(base.embed_tokens.weight)
    lm_head = embedding if _tied(model) else take(_head(model))
    final_norm = take(base.norm.weight)
    layers = []
    for block in base.layers:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        layers.append(
            LayerWeights(
                input_norm=take(block.input_layernorm.weight),
                qkv=fuse(*projections),
                qkv_bias=fuse(*projections, name="bias") if family.qkv_bias else None,
                q_norm=take(attention.q_norm.weight) if family.qk_norm else None,
                k_norm=take(attention.k_norm.weight) if family.qk_norm else None,
                o=take(attention.o_proj.weight),
                post_norm=take(block.post_attention_layernorm.weight),
                gate_up=fuse(mlp.gate_proj, mlp.up_proj),
                down=take(mlp.down_proj.weight),
            )
        )
        release(block)
    inv_freq = base.rotary_emb.inv_freq.detach().float().to(device).clone()
    release(model)
    return DecoderWeights(embedding, layers, final_norm, lm_head, inv_freq)


def fingerprint(model: PreTrainedModel, spec: DecoderSpec) -> str:
    """``w2-`` and 16 hex digits that name these weights, the same in fp32 and bf16: directions carry it to know their
    model, and run folders to be finished on the one that they were begun on.

    Hashes the sizes, and of every tensor some 4096 numbers that are spread over all of it, rounded to bf16; reading all
    of an 8B checkpoint would take longer than the use of it. The ``w2`` names what is hashed; see :func:`comparable`.
    """
    digest = hashlib.sha256()
    sizes = (spec.family, spec.n_layers, spec.hidden_size, spec.n_heads, spec.n_kv_heads, spec.head_dim)
    digest.update(repr((*sizes, spec.intermediate_size, spec.vocab_size)).encode())

    def feed(name: str, tensor: Tensor) -> None:
        whole = tensor.detach().flatten()
        # Odd: a power of two, as rows are long, would come by a few columns only.
        stride = max(1, len(whole) // _SAMPLED) | 1
        sample = whole[::stride].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())

    for name, parameter in decoder_of(model).named_parameters():
        feed(name, parameter)
    if not spec.tied_embeddings:
        feed("lm_head.weight", _head(model))
    return f"{_FORM}-{digest.hexdigest()[:16]}"


def comparable(stored: str) -> bool:
    """Does a difference from :func:`fingerprint` mean another model? Not for what was stored in the first form, 16 hex
    digits alone: it looked at the first numbers of some tensors."""
    return re.fullmatch("[0-9a-f]{16}", stored) is None
