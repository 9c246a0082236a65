"""Which decoders run here, and how one is taken over from transformers."""

from __future__ import annotations

from transformers import PreTrainedModel

from icon2_rt.models.checkpoint import WHICH_FILES, architecture_of, load_model, read_config
from icon2_rt.models.decoder import (
    DecoderSpec,
    DecoderWeights,
    Family,
    LayerWeights,
    comparable,
    fingerprint,
    read_spec,
    spec_of_config,
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
    """The family of a loaded model, by its exact class: a subclass, or a stranger of the same name, may compute
    something else."""
    kind = type(model)
    transformers_own = kind.__module__.partition(".")[0] == "transformers"
    return find_family(kind.__name__ if transformers_own else f"{kind.__module__}.{kind.__name__}")


__all__ = [
    "FAMILIES",
    "WHICH_FILES",
    "DecoderSpec",
    "DecoderWeights",
    "Family",
    "LayerWeights",
    "architecture_of",
    "comparable",
    "family_of",
    "find_family",
    "fingerprint",
    "load_model",
    "read_config",
    "read_spec",
    "spec_of_config",
    "supported",
    "take_weights",
]
