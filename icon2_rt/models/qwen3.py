"""Qwen3 (dense): an RMSNorm on every query and key head, and a head size of its own."""

from icon2_rt.models.decoder import Family
from icon2_rt.models.qwen2 import sliding_window

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    examples="Qwen3 0.6B to 32B (dense)",
    qk_norm=True,
    must_be={"attention_bias": False},
    sliding_window=sliding_window,
)
