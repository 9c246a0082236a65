"""Prompts as people have them: a tokenizer's own output, texts rendered by hand, tokenizers that end every text; and
vectors and strengths that are as long as what they are for."""

from __future__ import annotations

import warnings

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from icon2_rt import Direction, Runtime, tiny
from icon2_rt.pipeline.loading import read_directions
from tests.models import random_vectors, tiny_llama, tiny_tokenizer

CHAT = [{"role": "user", "content": "the thing"}]


def closing_tokenizer(*, bos: bool = True, eos: bool = False):
    """The small tokenizer, which puts a bos in front of every text, or an eos behind it."""
    tokenizer = tiny_tokenizer()
    single = f"{'<|bos|> ' if bos else ''}$A{' <|end|>' if eos else ''}"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|bos|>", 0), ("<|end|>", 1)]
    )
    return tokenizer


def test_what_apply_chat_template_returns_is_a_prompt():
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    rt = Runtime.from_pretrained(tiny.path(), kv_memory="4MiB")
    chat = [{"role": "user", "content": "Where does Mira live?"}]
    options = {"add_generation_prompt": True, "return_dict": True}
    right = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    for given in (
        tokenizer.apply_chat_template(chat, **options),
        tokenizer.apply_chat_template(chat, return_tensors="pt", **options),
    ):
        assert rt.encode(given) == right
    assert rt.generate([tokenizer.apply_chat_template(chat, **options)], max_new_tokens=3) == rt.generate(
        [chat], max_new_tokens=3
    )
    with pytest.raises(TypeError, match="token ids are whole numbers"):
        rt.encode({"input_ids": [right, right]})


def test_a_text_that_begins_with_the_bos_has_one():
    tokenizer = closing_tokenizer()
    rt = Runtime(tiny_llama(), tokenizer, kv_memory="4MiB")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    right = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(text) == [0, *right]  # two of them
    with pytest.warns(UserWarning, match="begins with <.bos.>.*one is kept"):
        assert rt.encode(text) == right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rt.encode(text) == right  # said once
        assert rt.encode([0, *right]) == [0, *right]
        assert rt.encode("the thing") == tokenizer.encode("the thing")


def test_a_prefix_of_text_does_not_end_with_the_eos_that_the_tokenizer_adds():
    tokenizer = closing_tokenizer(eos=True)
    rt = Runtime(tiny_llama(), tokenizer, kv_memory="4MiB", page_size=8)
    plain = tokenizer.encode("the thing", add_special_tokens=False)
    with rt.prefix("the thing") as prefix:
        assert list(prefix.tokens) == [0, *plain]
        joined = prefix.join_all([" on"], None)[0]
    assert joined == [0, *tokenizer.encode("the thing on", add_special_tokens=False)]
    with rt.prefix("the thing<|end|>") as prefix:
        assert list(prefix.tokens)[-2:] == [plain[-1], 1]  # written in the text itself


def test_a_list_of_strengths_may_be_as_long_as_the_slice():
    d = Direction("d", random_vectors(12, 8, seed=1), torch.ones(12))
    listed, whole = [0.1 * k for k in range(1, 6)], [0.0] * 12
    whole[3:8] = listed
    assert torch.equal((listed * d[3:8]).terms[0].alpha, (whole * d).terms[0].alpha)
    assert torch.equal((torch.tensor(listed) * d[[7, 3, 4, 5, 6]]).terms[0].alpha, (whole * d).terms[0].alpha)
    assert torch.equal(d[3:8].clamped(listed).terms[0].alpha, (whole * d).terms[0].alpha)
    with pytest.raises(ValueError, match=r"one per block of the model \[12\], or one per block of the slice .* \[5\]"):
        listed[:4] * d[3:8]


def test_a_control_vector_that_stops_early_is_read_for_the_model(tmp_path):
    """llama.cpp applies direction.1 … direction.3 to a model of any number of blocks above that."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "early.gguf", "controlvector")
    rows = random_vectors(4, 128, seed=2)
    for layer in (1, 2, 3):
        writer.add_tensor(f"direction.{layer}", rows[layer].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [made] = read_directions(tmp_path / "early.gguf", 6)
    assert (made.n_layers, made.layers) == (6, [1, 2, 3])
    own = Direction.load(tmp_path / "early.gguf", n_layers=6)
    assert torch.equal(own.vectors, made.vectors)
    rt = Runtime.from_pretrained(tiny.path(), kv_memory="4MiB")
    [completion] = rt.generate([[1, 40, 200]], 0.5 * made, max_new_tokens=3)
    whole = Direction("w", torch.cat([torch.zeros(1, 128), rows[1:], torch.zeros(2, 128)]))
    assert completion == rt.generate([[1, 40, 200]], 0.5 * whole, max_new_tokens=3)[0]
    ours = Direction("ours", random_vectors(4, 128, seed=3), torch.ones(4), method="pca")
    ours[1:].save(tmp_path / "ours.gguf")
    assert next(iter(read_directions(tmp_path / "ours.gguf", 6))).n_layers == 4  # refused later, by its size
