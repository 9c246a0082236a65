"""Which decoders run here, and how one is taken over from transformers."""

from __future__ import annotations

from transformers import PreTrainedModel

from icon2_rt.models.decoder import (
    DecoderSpec,
    DecoderWeights,
    Family,
    LayerWeights,
    fingerprint,
    read_spec,
    take_weights,
)
from icon2_rt.models.llama import LLAMA
from icon2_rt.models.mistral import MISTRAL
from icon2_rt.models.qwen2 import QWEN2
from icon2_rt.models.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {f.architecture: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def supported() -> str:
    """The supported architectures as one sentence for error messages and documents."""
    return "; ".join(f"{f.architecture} ({f.examples})" for f in FAMILIES.values())


def find_family(architecture: str) -> Family:
    """The family of a transformers architecture (``"LlamaForCausalLM"``).

    Raises:
        ValueError: not supported; the message lists what is.
    """
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not supported. Supported: {supported()}")
    return FAMILIES[architecture]


def family_of(model: PreTrainedModel) -> Family:
    """The family of a loaded model, by its exact class: a subclass may compute something else."""
    return find_family(type(model).__name__)


__all__ = [
    "FAMILIES",
    "DecoderSpec",
    "DecoderWeights",
    "Family",
    "LayerWeights",
    "family_of",
    "find_family",
    "fingerprint",
    "read_spec",
    "supported",
    "take_weights",
]
