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
    logits of the steered model (before any processor), natural log; ``text`` is how they read behind the prompt,
    without special tokens (None without a tokenizer). ``seed`` is the row seed: passed as ``seed=[seed]`` it reproduces
    the row alone (None when decoding was greedy).

    ``message`` is the content of the assistant's message that answers a chat, where that is not ``text``: it begins
    with what the chat's last message had begun, and leaves out a first space that the chat template brings itself.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    seed: int | None
    message: str | None = None


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

        A last message of the assistant, which both responses continue, is the beginning of both in the record.

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
        begun = messages.pop()["content"] if messages[-1].get("role") == "assistant" else ""

        def answer(completion: Completion) -> list[dict[str, str]]:
            content = completion.message if completion.message is not None else begun + (completion.text or "")
            return [{"role": "assistant", "content": content}]

        return {"prompt": messages, "chosen": answer(self.positive), "rejected": answer(self.negative)}


@dataclass(frozen=True)
class Scored:
    """Teacher-forced figures of one completion: natural-log probability of each token, and the entropy (nats) of the
    distribution that it was scored under."""

    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
