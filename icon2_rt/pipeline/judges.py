"""Outside judges of a response: a reward model from transformers, or a function of the user's.

The method needs none. The recipes that it is compared with do, and a calibration can use one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # instructions, responses → one number each

_BATCH = 8


def verdicts(judge: Judge, instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What a judge gives each response; higher is better.

    Raises:
        ValueError: another number of verdicts than responses, or one that is no finite number, with the response.
    """
    given = [float(value) for value in judge(list(instructions), list(responses))]
    if len(given) != len(responses):
        raise ValueError(f"the judge gave {len(given)} verdicts on {len(responses)} responses: one for each")
    for value, instruction, response in zip(given, instructions, responses, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the judge gave {value} to a response; it must be a finite number. Instruction {instruction!r:.80}, "
                f"response {response!r:.80}"
            )
    return given


@dataclass
class RewardModel:
    """A transformers sequence classification model as a judge: the logit of one label is the verdict.

    ``tokens`` counts what it has read, ``parameters`` what it has: the figures of a cost account.
    """

    model: Any
    tokenizer: Any
    label: int
    tokens: int = 0

    @classmethod
    def load(cls, path: str, label: str | None = None, device: str | torch.device = "cpu") -> RewardModel:
        """Load a checkpoint (a folder or a hub id).

        Args:
            label: the label whose logit is the verdict; a model with one output needs none.

        Raises:
            ValueError: no sequence classification model, or several labels and none, or an unknown one, named.
            OSError: not found.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        config = AutoConfig.from_pretrained(path)
        if not any("SequenceClassification" in name for name in config.architectures or ()):
            raise ValueError(
                f"{path} is no reward model: its architecture is {', '.join(config.architectures or ['unknown'])}, and "
                f"a judge must be one for sequence classification"
            )
        labels = [str(config.id2label[k]) for k in sorted(config.id2label)]
        if label is None and len(labels) > 1:
            raise ValueError(f"{path} has {len(labels)} labels ({', '.join(labels)}): name the one that means good")
        if label is not None and label not in labels:
            raise ValueError(f"{path} has no label {label!r}, only {', '.join(labels)}")
        model = AutoModelForSequenceClassification.from_pretrained(path).eval().to(device)
        return cls(model, AutoTokenizer.from_pretrained(path), 0 if label is None else labels.index(label))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def __call__(self, instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [self._encode(i, r) for i, r in zip(instructions, responses, strict=True)]
        self.tokens += sum(map(len, texts))
        pad = self.tokenizer.pad_token_id
        size = 1 if pad is None else _BATCH
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding in a batch
        found = [0.0] * len(texts)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            longest = max(len(texts[n]) for n in batch)
            ids = torch.full((len(batch), longest), 0 if pad is None else pad)
            mask = torch.zeros_like(ids)
            for row, n in enumerate(batch):
                ids[row, : len(texts[n])] = torch.tensor(texts[n])
                mask[row, : len(texts[n])] = 1
            device = next(self.model.parameters()).device
            with torch.inference_mode():
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
            for row, n in enumerate(batch):
                found[n] = float(logits[row, self.label])
        return found

    def _encode(self, instruction: str, response: str) -> list[int]:
        """As a chat where the tokenizer has a template for one, else as a pair of texts."""
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(instruction, response)["input_ids"])
