"""Prefill, the decode step, KV pages, rows and groups, sampling: everything between token ids and completions."""

from icon2_rt.engine.engine import Engine, EngineOptions
from icon2_rt.engine.forward import Model
from icon2_rt.engine.record import Record
from icon2_rt.engine.rows import Branch, PinnedPrefix, Reading, Request, Row
from icon2_rt.engine.sampling import Sampling, resolve_sampling

__all__ = [
    "Branch",
    "Engine",
    "EngineOptions",
    "Model",
    "PinnedPrefix",
    "Reading",
    "Record",
    "Request",
    "Row",
    "Sampling",
    "resolve_sampling",
]
