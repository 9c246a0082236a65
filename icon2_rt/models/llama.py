"""Llama 2 and 3 (and checkpoints in its format: Vicuna, TinyLlama, SmolLM, Yi …)."""

from icon2_rt.models.decoder import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    examples="Llama 2, 3, 3.1, 3.2 (text), TinyLlama, SmolLM 1 and 2",
    must_be={"attention_bias": False, "mlp_bias": False},
)
