"""What comes back from the runtime: plain dataclasses, no tensors, nothing that refers to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]
FinishReason = Literal["eos", "stop_string", "length"]


@dataclass(frozen=True)
class Completion:
    """One finished branch.

    ``token_ids`` are the generated tokens, the ending eos included; ``logprobs`` their log-softmax under the raw
    logits of the steered model (before any processor), natural log; ``text`` is their decoding without special tokens
    (None without a tokenizer). ``seed`` is the row seed: passed as ``seed=[seed]`` it reproduces the row alone (None
    when decoding was greedy).
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    seed: int | None


@dataclass(frozen=True)
class BranchedOutput:
    """The K branches of one prompt, in the order in which they were asked for."""

    index: int
    prompt: Prompt
    branches: list[Completion]


@dataclass(frozen=True)
class PairedOutput:
    """The positive and the negative branch of one prompt; ``index`` is the prompt's place in the call."""

    index: int
    prompt: Prompt
    positive: Completion
    negative: Completion

    def to_preference(self) -> dict[str, Any]:
        """TRL's preference record ``{prompt, chosen, rejected}``: messages if the prompt was a chat, else strings.

        Raises:
            ValueError: the prompt was token ids, or the runtime had no tokenizer: there is no text to write.
        """
        if self.positive.text is None or self.negative.text is None:
            raise ValueError("to_preference() needs text, and this runtime was made without a tokenizer")
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "chosen": self.positive.text, "rejected": self.negative.text}
        messages = [dict(part) for part in self.prompt if isinstance(part, Mapping)]
        if not messages:
            raise ValueError("to_preference() needs a text or chat prompt; this one was given as token ids")
        return {
            "prompt": messages,
            "chosen": [{"role": "assistant", "content": self.positive.text}],
            "rejected": [{"role": "assistant", "content": self.negative.text}],
        }


@dataclass(frozen=True)
class Scored:
    """Teacher-forced figures of one completion: natural-log probability of each token, and the entropy (nats) of the
    distribution that it was scored under."""

    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
