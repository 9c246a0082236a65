"""Outside judges of a response: a reward model from transformers, or a function of the user's.

The method needs none. The recipes that it is compared with do, and a calibration can use one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from icon2_rt.pipeline.functions import is_function, load_function

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # instructions, responses → one number each

_BATCH = 8
# What every judge is asked before the work whose result it will judge.
_PROBE = (["What is the capital of France?"] * 2, ["The capital of France is Paris.", "I do not know."])


def load_judge(name: str, label: str | None, device: str | torch.device, setting: str) -> Judge:
    """The judge that a config names: a function ("module:function"), or else a reward model.

    It is asked once, about two texts, so that one that does not work is told before the work that it will judge.

    Raises:
        ValueError: as :meth:`RewardModel.load`, :func:`~icon2_rt.pipeline.functions.load_function` and
            :func:`verdicts`, or not found; ``setting`` names the config key.
    """
    try:
        judge = load_function(name, setting) if is_function(name) else RewardModel.load(name, label, device)
        verdicts(judge, *_PROBE)
        if isinstance(judge, RewardModel):
            judge.tokens = 0  # the account begins with the work
    except (OSError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(setting) else f"{setting}: {text}") from error
    return judge


def verdicts(judge: Judge, instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What a judge gives each response; higher is better.

    Raises:
        ValueError: it raises; another number of verdicts than responses; one that is no finite number, with the
            response.
    """
    try:
        given: Any = judge(list(instructions), list(responses))
    except Exception as error:  # it is the user's code, and may raise anything
        raise ValueError(f"the judge raised {type(error).__name__}: {error}") from error
    if hasattr(given, "tolist"):
        given = given.tolist()
    try:
        given = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the judge must give a number for each response: {error}") from None
    if len(given) != len(responses):
        raise ValueError(f"the judge gave {len(given)} verdicts on {len(responses)} responses: one for each")
    for value, instruction, response in zip(given, instructions, responses, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the judge gave {value} to a response; it must be a finite number. Instruction {instruction!r:.80}, "
                f"response {response!r:.80}"
            )
    return given


def check_reward_model(path: str, label: str | None) -> int:
    """The place of ``label`` among a reward model's labels (0 where it has one), from its config alone.

    Raises:
        ValueError: not a sequence classification model; several labels and none, or an unknown one, named.
        OSError: not found.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        raise ValueError(
            f"{path} is no reward model: its architecture is {', '.join(config.architectures or ['unknown'])}, and "
            f"a judge must be one for sequence classification, or a function of your own"
        )
    labels = [str(config.id2label[k]) for k in sorted(config.id2label)]
    if label is None and len(labels) > 1:
        raise ValueError(f"{path} has {len(labels)} labels ({', '.join(labels)}): name the one that means good")
    if label is not None and label not in labels:
        raise ValueError(f"{path} has no label {label!r}, only {', '.join(labels)}")
    return 0 if label is None else labels.index(label)


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
            ValueError: as :func:`check_reward_model`, or a checkpoint without the weights of its head.
            OSError: not found.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        column = check_reward_model(path, label)
        model, loading = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        if loading["missing_keys"]:
            raise ValueError(
                f"{path} has no weights for {', '.join(sorted(loading['missing_keys'])[:3])}: it was not trained as a "
                f"reward model, and its verdicts would be random"
            )
        return cls(model.eval().to(device), AutoTokenizer.from_pretrained(path), column)

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
