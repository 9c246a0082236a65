"""Tokenizers that keep a space in the token behind it, as those of Llama 2, Mistral 7B, TinyLlama and Zephyr do."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import CHAT_TEMPLATE, SPECIAL, VOCAB, with_marks

# As Llama 2 renders a chat: the space in front of a response is the template's.
INST_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ ' ' ~ (m.content | trim) ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
# As Mistral 7B v0.1 does: what the model wrote stands right behind the mark.
BARE_TEMPLATE = INST_TEMPLATE.replace("' ' ~ (m.content | trim) ~ ' ' ~", "m.content ~")
# As later ones do: a space of the template's, and whatever the message begins with.
UNTRIMMED = INST_TEMPLATE.replace("(m.content | trim)", "m.content")


def space_tokenizer(kind: str, chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """``kind`` "metaspace" (today's form) or "legacy" (a space before every text between special tokens)."""
    characters = ["▁", "\n", *(chr(c) for c in range(33, 126))]  # all printable ones but "~"
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("▁", "b"), ("▁", "H")]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters, *(a + b for a, b in merges)])}
    assert len(vocab) <= VOCAB
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if kind == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return with_marks(core, chat_template)
