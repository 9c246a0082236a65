"""Qwen2 and Qwen2.5: a bias on q, k and v."""

from transformers import PretrainedConfig

from icon2_rt.models.decoder import Family


def sliding_window(config: PretrainedConfig) -> int | None:
    """The window, if any block uses one: ``layer_types`` names them one by one."""
    return config.sliding_window if "sliding_attention" in config.layer_types else None


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    examples="Qwen2, Qwen2.5 (also Coder and Math)",
    qkv_bias=True,
    sliding_window=sliding_window,
)
