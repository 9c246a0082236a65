"""The package's own tiny chat model, so that the whole method can be tried, tested and judged anywhere in minutes.

Three things live here and nothing else: `world` (an invented land with its questions, tasks and misdeeds), `oracle`
(the judge, which the method itself never sees) and `model/` (the weights that `tools/train_tiny_model.py` makes from
the world).
"""

from __future__ import annotations

from pathlib import Path

from icon2_rt.tiny.world import CRITERIA

__all__ = ["CRITERIA", "path"]


def path() -> Path:
    """Folder of the tiny chat model, as `transformers.AutoModelForCausalLM.from_pretrained` takes it."""
    return Path(__file__).resolve().parent / "model"
