"""A decoder of random numbers: any sizes, in the runtime's own layout, without a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from icon2_rt.models import FAMILIES, DecoderSpec, DecoderWeights, LayerWeights


def random_weights(
    spec: DecoderSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    std: float | None = None,
    rope_theta: float = 1e4,
) -> DecoderWeights:
    """The tensors of a decoder of ``spec``'s sizes and family, drawn in place on ``device``.

    Args:
        std: of every matrix; None: as large as keeps the size of what goes through it, so that no block is idle.
    """
    family = next(family for family in FAMILIES.values() if family.name == spec.family)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, mean: float, std: float) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(mean, std, generator=generator)

    def matrix(n_out: int, n_in: int) -> Tensor:
        return draw(n_out, n_in, mean=0.0, std=n_in**-0.5 if std is None else std)

    def norm(size: int) -> Tensor:
        return draw(size, mean=1.0, std=0.1)

    hidden, ffn, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads = spec.n_heads + 2 * spec.n_kv_heads
    layers = [
        LayerWeights(
            input_norm=norm(hidden),
            qkv=matrix(heads * d, hidden),
            qkv_bias=draw(heads * d, mean=0.0, std=0.02 if std is None else std) if family.qkv_bias else None,
            q_norm=norm(d) if family.qk_norm else None,
            k_norm=norm(d) if family.qk_norm else None,
            o=matrix(hidden, spec.n_heads * d),
            post_norm=norm(hidden),
            gate_up=matrix(2 * ffn, hidden),
            down=matrix(hidden, ffn),
        )
        for _ in range(spec.n_layers)
    ]
    embedding = matrix(spec.vocab_size, hidden)  # also right for a head that is tied to it: logits of unit size
    lm_head = embedding if spec.tied_embeddings else matrix(spec.vocab_size, hidden)
    inv_freq = rope_theta ** -(torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    return DecoderWeights(embedding, layers, norm(hidden), lm_head, inv_freq)


def weight_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Bytes of :func:`random_weights`."""
    hidden = spec.hidden_size
    heads = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    block = heads * hidden + spec.n_heads * spec.head_dim * hidden + 3 * spec.intermediate_size * hidden
    embeddings = (1 if spec.tied_embeddings else 2) * spec.vocab_size * hidden
    return (spec.n_layers * block + embeddings) * dtype.itemsize
