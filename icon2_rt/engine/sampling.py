"""Sampling options: transformers' names and defaults in, one frozen value out, checked before any work starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig

DEFAULT_MAX_NEW_TOKENS = 256

# Below this temperature fp32 logits could divide to infinity; it is as cold as greedy long before.
_COLDEST = 1e-30

# Fields of GenerationConfig that are understood here, and those that change nothing of the text that comes out.
SUPPORTED = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "repetition_penalty", "eos_token_id", "stop_strings",
)  # fmt: skip
_HARMLESS = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "renormalize_logits", "compile_config", "disable_compile", "continuous_batching_config",
    "low_memory", "prefill_chunk_size", "transformers_version", "_from_model_config", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "is_assistant", "remove_invalid_values", "early_stopping", "length_penalty",
}  # fmt: skip
# What "not used" looks like for the others; anything else would change the output, and raises.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "typical_p": (1.0,), "top_h": (1.0,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "diversity_penalty": (0.0,),
    "guidance_scale": (1.0,), "token_healing": (False,), "bad_words_ids": ([],), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "use_mtp": (False,), "prompt_lookup_num_tokens": (0,),
}  # fmt: skip


# What other tools call it.
_MEANT = {
    "stop": "stop_strings", "stop_words": "stop_strings", "stop_sequences": "stop_strings",
    "stop_token_ids": "eos_token_id", "max_tokens": "max_new_tokens", "temp": "temperature",
    "repeat_penalty": "repetition_penalty", "num_samples": "n", "n_samples": "n", "steer": "steering",
    "random_state": "seed", "template_kwargs": "chat_template_kwargs",
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How one request's rows are sampled and when they stop. Neutral values: temperature 1, top_k 0, top_p 1, min_p 0,
    repetition_penalty 1. ``max_new_tokens`` None = as many as fit, at most 256."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def budget(self, n_prompt: int, room: int) -> int:
        """How many tokens a row may generate after ``n_prompt`` tokens, in a model of ``room`` positions."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            return self.max_length - n_prompt
        return min(DEFAULT_MAX_NEW_TOKENS, room - n_prompt)


class WholeConfig(GenerationConfig):
    """A generation config that owes nothing to a model's own: what it leaves out has transformers' default."""


def resolve_sampling(
    base: GenerationConfig | None,
    options: Mapping[str, Any],
    *,
    model: GenerationConfig | None = None,
    vocab_size: int,
    default_eos: Any = None,
    arguments: Sequence[str] = (),
) -> Sampling:
    """Merge keyword options, a GenerationConfig and the model's own into one value; the earlier ones win.

    Fields that are unset in all of them take transformers' defaults, top_k = 50 included, and ``default_eos``, the
    tokenizer's. Giving temperature, top_k, top_p or min_p as an option means ``do_sample=True`` unless do_sample is
    given too. A limit replaces a later one's of either kind (max_new_tokens, max_length). ``arguments`` are the call's
    others, which an unknown option may have meant.

    Raises:
        TypeError: an option that does not exist. ValueError: a value out of range, or a field that would change the
        output and is not supported.
    """
    known = set(GenerationConfig().to_dict()) | set(_HARMLESS) | set(_NEUTRAL)
    for name in options:
        if name not in known or name == "transformers_version":
            allowed = (*arguments, *SUPPORTED)
            meant = [_MEANT[name]] if _MEANT.get(name) in allowed else difflib.get_close_matches(name, allowed, 1)
            hint = f": did you mean {meant[0]!r}?" if meant else "."
            others = f"Arguments are {', '.join(arguments)}; sampling" if arguments else "Sampling"
            raise TypeError(f"unknown option {name!r}{hint} {others} options are {', '.join(SUPPORTED)}")
    if base is not None and not isinstance(base, GenerationConfig):
        raise TypeError(f"generation_config must be a transformers GenerationConfig, not {type(base).__name__}")
    options = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in options.items()}  # numpy's numbers
    # A field that transformers does not know (checkpoints carry some) changes nothing there either.
    merged = {} if isinstance(base, WholeConfig) else _set_fields(model, known)
    for layer in (_set_fields(base, known), options):
        if {"max_new_tokens", "max_length"} & layer.keys():
            merged.pop("max_new_tokens", None)
            merged.pop("max_length", None)
        merged.update({k: v for k, v in layer.items() if v is not None})
    if {"temperature", "top_k", "top_p", "min_p"} & {k for k, v in options.items() if v is not None}:
        merged["do_sample"] = True if options.get("do_sample") is None else options["do_sample"]
    for name, value in merged.items():
        if name in SUPPORTED or name in _HARMLESS or value in _NEUTRAL.get(name, ()):
            continue
        if name == "num_return_sequences":
            raise ValueError(f"{name}={value!r} is not read here: n={value!r} gives that many samples of each prompt")
        raise ValueError(
            f"{name}={value!r} would change the output and is not supported. Supported: {', '.join(SUPPORTED)}"
        )

    eos = merged.get("eos_token_id", default_eos)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    stop = merged.get("stop_strings") or ()
    sampling = Sampling(
        do_sample=bool(merged.get("do_sample", False)),
        temperature=merged.get("temperature", 1.0),
        top_k=merged.get("top_k", 50),
        top_p=merged.get("top_p", 1.0),
        min_p=merged.get("min_p", 0.0),
        repetition_penalty=merged.get("repetition_penalty", 1.0),
        max_new_tokens=merged.get("max_new_tokens"),
        max_length=merged.get("max_length"),
        min_new_tokens=merged.get("min_new_tokens", 0),
        min_length=merged.get("min_length", 0),
        eos_token_ids=eos_ids,
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    _check(sampling, vocab_size)
    return replace(sampling, top_k=min(sampling.top_k, vocab_size))


def _set_fields(config: GenerationConfig | None, known: Container[str]) -> dict[str, Any]:
    return {k: v for k, v in (config.to_dict() if config is not None else {}).items() if v is not None and k in known}


def generable(eos_token_id: Any, vocab_size: int) -> tuple[Any, list[int]]:
    """Ending tokens less those that the model cannot generate (None where nothing is left), and what was left out."""
    ids = list(eos_token_id) if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    out = [i for i in ids if isinstance(i, int) and not 0 <= i < vocab_size]
    if not out:
        return eos_token_id, []
    return [i for i in ids if i not in out] or None, out


def _check(s: Sampling, vocab_size: int) -> None:
    def number(name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(s, name)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or value < low or value > high or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
            raise ValueError(f"{name} must be a number {bounds}, not {value!r}")

    def count(name: str, low: int) -> None:
        value = getattr(s, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
            raise ValueError(f"{name} must be a whole number of at least {low}, not {value!r}")

    if s.do_sample:
        if s.temperature == 0:
            raise ValueError("temperature must be above 0, not 0: greedy decoding is do_sample=False")
        number("temperature", _COLDEST, math.inf)
        number("top_p", 0.0, 1.0, above=True)
        number("min_p", 0.0, 1.0)
        count("top_k", 0)
    number("repetition_penalty", 0.0, math.inf, above=True)
    count("max_new_tokens", 1)
    count("max_length", 1)
    count("min_new_tokens", 0)
    count("min_length", 0)
    if s.max_new_tokens is not None and s.min_new_tokens > s.max_new_tokens:
        raise ValueError(f"min_new_tokens={s.min_new_tokens} is more than max_new_tokens={s.max_new_tokens}")
    for token in s.eos_token_ids:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_id {token!r} is not a token of this model (0 to {vocab_size - 1})")
    for text in s.stop_strings:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop_strings must be non-empty strings, not {text!r}")
