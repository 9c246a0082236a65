"""Stop strings are found where the whole text has them, with about one decoding of the tokenizer a token."""

from __future__ import annotations

from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from icon2_rt.engine.stops import StopText
from icon2_rt.prompts import Encoder
from tests.models import tiny_tokenizer
from tests.sentencepiece import space_tokenizer

TEXT = "naïve café: 🙂🙃 the end. 日本語のテキスト, déjà vu — a  b\n\nthe the 🙂"


def byte_tokenizer(clean: bool = False) -> PreTrainedTokenizerFast:
    """Every byte a token, and a few words: most characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "."), ("ð", "Ł"), ("Ģ", "Ŀ")]
    vocab = {token: n for n, token in enumerate(["<|end|>", "<|pad|>", *alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=clean
    )


TOKENIZERS = {
    "characters": tiny_tokenizer,
    "bytes": byte_tokenizer,
    "bytes, cleaned up": lambda: byte_tokenizer(clean=True),
    "metaspace": lambda: space_tokenizer("metaspace"),
    "legacy": lambda: space_tokenizer("legacy"),
}


def random_ids(tokenizer: PreTrainedTokenizerBase, draw: Random, n: int) -> list[int]:
    """Pieces of text, tokens drawn one by one (half of a character, two special ones), and runs of special tokens."""
    ids: list[int] = []
    while len(ids) < n:
        kind = draw.random()
        begin = draw.randrange(len(TEXT))
        if kind < 0.5:
            ids += tokenizer.encode(TEXT[begin : begin + draw.randrange(1, 30)], add_special_tokens=False)
        elif kind < 0.9:
            ids += [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 6))]
        else:
            ids += [draw.choice(tokenizer.all_special_ids)] * draw.randrange(1, 40)
    return ids[:n]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(8))
def test_a_stop_string_is_found_where_the_whole_text_has_it(name, seed):
    tokenizer, draw = TOKENIZERS[name](), Random(seed)
    encoder = Encoder(tokenizer, len(tokenizer), 10000)
    found = 0
    for _ in range(6):
        prompt, ids = random_ids(tokenizer, draw, draw.randrange(1, 50)), random_ids(tokenizer, draw, 150)
        whole = encoder.decode_behind(prompt, ids)
        strings = []
        for _ in range(draw.randrange(1, 4)):
            begin = draw.randrange(max(1, len(whole) * 2 // 3), max(2, len(whole)))
            strings.append(whole[begin : begin + draw.randrange(1, 12)] or "never")
        strings = [s for s in strings if "\ufffd" not in s] or ["never"]
        stops = StopText(strings, prompt, encoder.decode_behind)
        for n in range(1, len(ids) + 1):
            expected = any(s in encoder.decode_behind(prompt, ids[:n]) for s in strings)
            assert stops.reached(ids[:n]) == expected, (strings, n)
            if expected:
                found += 1
                break
    assert found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_about_one_decoding_a_token(name):
    tokenizer, draw = TOKENIZERS[name](), Random(0)
    encoder = Encoder(tokenizer, len(tokenizer), 10000)
    decode, calls = tokenizer.decode, []

    def counted(ids: list[int], **options: object) -> str:
        calls.append(len(ids))
        return str(decode(ids, **options))

    tokenizer.decode = counted
    texts = [t for t in range(len(tokenizer)) if decode([t], skip_special_tokens=True).isascii()]
    texts = [t for t in texts if t not in tokenizer.all_special_ids]
    ids = [draw.choice(texts) for _ in range(400)]
    stops = StopText(["never to be", "seen"], [5, 6, 7], encoder.decode_behind)
    assert not any(stops.reached(ids[:n]) for n in range(1, 401))
    assert len(calls) < 1.2 * 400
    assert max(calls) < 100  # and of a few tokens, however long the text


def test_special_tokens_behind_the_window_do_not_hide_the_text():
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, len(tokenizer), 10000)
    first, last = (tokenizer.encode(text) for text in ("the e", "nd."))
    stops = StopText(["end"], [5], encoder.decode_behind)
    ids = [*first, *[0] * 200, *last]
    reached = [n for n in range(1, len(ids) + 1) if stops.reached(ids[:n])]
    assert reached[0] == len(first) + 200 + 2


def test_a_place_from_which_the_text_is_another_is_not_taken():
    """A decoder that marks a text that begins inside a word, as WordPiece's does."""

    def decode(before: list[int], ids: list[int]) -> str:
        inside = bool(before) and ids[0] % 2 == 1
        return ("##" if inside else "") + "".join(chr(97 + i) for i in ids)

    stops = StopText(["##", "never"], [], decode)
    assert not any(stops.reached([1] * n) for n in range(1, 100))
