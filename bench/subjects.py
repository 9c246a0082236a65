"""What is measured end to end: the model that ships with the package, a random Llama of 100M parameters, and random
models of real sizes for a GPU (bench/shapes.py); their prompts.

All are built from seeds and fixed lists alone, so that every process, and every machine, measures the same thing.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench import shapes
from icon2_rt import Direction, Steering, tiny
from icon2_rt.tiny import world

SEED = 0
# Prompt lengths in tokens by number of prompts: a short question to a long context, in no order.
MIXED = (128, 16, 400, 48, 256, 32, 96, 64)
LENGTHS = {1: MIXED[:1], 8: MIXED, 32: MIXED * 4}
# Strength of the pushes as a share of the residual norm: enough that both branches write different texts.
DOSES = {"positive": 0.10, "negative": -0.05}


@dataclass(frozen=True)
class RandomLlama:
    """The random model's sizes (transformers' names)."""

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = True


def load(name: str, device: torch.device) -> PreTrainedModel:
    """``"tiny"``, ``"random100m"`` (fp32) or a shape (bf16 on a GPU), in evaluation mode, without an end-of-sequence
    token: every contestant generates as many tokens as it is asked for, with no logits processor to see to it."""
    model: PreTrainedModel
    if name == "tiny":
        model = AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)
    elif name == "random100m":
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(LlamaConfig(**asdict(RandomLlama()), dtype=torch.float32))
    else:
        return shapes.transformers_model(name, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().to(device)


def describe(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Name and sizes, for the record."""
    config = model.config
    return {
        "name": name,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        **{field: getattr(config, field) for field in RandomLlama.__dataclass_fields__},
    }


def prompts(name: str, n: int) -> list[list[int]]:
    """``n`` prompts of the lengths in :data:`LENGTHS`, as token ids: the tiny world's text for the tiny model, random
    ids for the random ones."""
    lengths = LENGTHS[n]
    if name == "tiny":
        rng = random.Random(SEED)
        tokenizer = AutoTokenizer.from_pretrained(tiny.path())
        text: list[int] = []
        while len(text) < sum(lengths):
            text += tokenizer.encode(world.sample_instruction(rng), add_special_tokens=False)
        begins = [sum(lengths[:i]) for i in range(n)]
        return [text[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]
    generator = torch.Generator().manual_seed(SEED)
    vocab = shapes.SHAPES[name].vocab_size if name in shapes.SHAPES else RandomLlama.vocab_size
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def steerings(model: PreTrainedModel, prompt: list[int]) -> dict[str, Steering]:
    """Both branches' steerings: a random direction (what a push costs does not depend on where it points) on the middle
    third of the blocks, as strong as :data:`DOSES` say of the residual norm at ``prompt``'s last token."""
    config = model.config
    n_layers = config.num_hidden_layers
    vectors = torch.randn(n_layers, config.hidden_size, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        ids = torch.tensor([prompt], device=model.device)
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    norms = torch.stack([state[0, -1].float().norm() for state in states[1:]]).cpu()
    chosen = Direction("random", vectors)[n_layers // 3 : n_layers - n_layers // 3]
    return {branch: dose * norms * chosen for branch, dose in DOSES.items()}
