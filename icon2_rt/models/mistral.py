"""Mistral 7B and its successors with the same architecture; early ones attend to a sliding window only."""

from icon2_rt.models.decoder import Family

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    examples="Mistral 7B v0.1 to v0.3, Mistral Nemo, Zephyr",
    sliding_window=lambda config: config.sliding_window,
)
