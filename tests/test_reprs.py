"""What is printed says what was built; what a notebook shows is escaped."""

from __future__ import annotations

import copy
import json
import pickle
from html.parser import HTMLParser

import pytest
import torch

from icon2_rt import BranchedOutput, Completion, Direction, PairedOutput, Runtime
from icon2_rt.outputs import OutputList
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_tokenizer

D = Direction("d", random_vectors(6, 8, seed=0), torch.ones(6))
E = Direction("e", random_vectors(6, 8, seed=1))  # with the scale of its own vectors


@pytest.mark.parametrize(
    ("steering", "text"),
    [
        (0.1 * D, "0.1 * d[0:6], scope='response'"),
        (-D[1:3], "-1 * d[1:3], scope='response'"),
        (0.1 * E[2:4], "0.1 * e[2:4], scope='response'"),
        (D.ablated(), "d[0:6].ablated(), scope='response'"),
        (D[2].clamped(2.5).with_scope("all"), "d[2].clamped(2.5), scope='all'"),
        (D[[1, 4]].amplified(0.5), "d[1, 4].amplified(0.5), scope='response'"),
        (0.5 * D[0].clamped(2.0), "d[0] with α=1, β=-0.5, scope='response'"),
        ([0, 0.1, 0.2, 0, 0, 0.4] * D, "(0.1 … 0.4) * d[1:3, 5], scope='response'"),
        (0.1 * D[1:3] - 0.05 * E[4], "0.1 * d[1:3] - 0.05 * e[4], scope='response'"),
        ((D + E.ablated()).with_keep_norm(), "1 * d[0:6] + e[0:6].ablated(), scope='response', keep_norm"),
        (0 * D, "0 * d, scope='response'"),
        (0.25 * D.at(3).everywhere(), "0.25 * d[0:6], scope='response'"),
    ],
)
def test_a_steering_says_strength_sign_operation_band_and_scope(steering, text):
    assert repr(steering) == f"Steering({text})"


def completion(text: str | None, n: int = 3) -> Completion:
    return Completion(text, list(range(n)), [0.0] * n, "eos", 7)


def test_outputs_are_short():
    long = completion("word " * 200, 1000)
    assert len(repr(long)) < 110
    assert repr(completion("a 'b'", 1)) == "Completion(\"a 'b'\", 1 token, eos)"
    assert repr(completion(None, 12)) == "Completion([0, 1, 2, 3, 4, 5, 6, 7, …], 12 tokens, eos)"
    pair = PairedOutput(2, [{"role": "user", "content": "hi"}], completion("yes"), completion("no"), sample=1)
    assert repr(pair) == (
        "PairedOutput(index=2, sample=1, prompt='user: hi', positive=Completion('yes', 3 tokens, eos), "
        "negative=Completion('no', 3 tokens, eos))"
    )
    output = BranchedOutput(0, [5, 6], [completion("x")])
    assert repr(output) == "BranchedOutput(index=0, prompt=[5, 6], branches=[Completion('x', 3 tokens, eos)])"


class _Read(HTMLParser):
    """Cells of a table by tag, as a browser would show them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "th", "caption"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def read(html: str) -> _Read:
    parser = _Read()
    parser.feed(html)
    assert parser.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    return parser


EVIL = "<script>alert('x')</script> & <b>"


def test_lists_of_outputs_are_tables_with_escaped_text():
    pair = PairedOutput(0, EVIL, completion(EVIL), completion("fine"))
    again = PairedOutput(0, EVIL, completion("b"), completion("c"), sample=1)
    cells = read(OutputList([pair, again])._repr_html_()).cells
    assert cells == ["2 outputs", "", "prompt", "positive", "negative", "0", EVIL, EVIL, "fine", "0.1", EVIL, "b", "c"]
    chat = [{"role": EVIL, "content": EVIL}]
    cells = read(OutputList([BranchedOutput(0, chat, [completion("a"), completion(EVIL)])])._repr_html_()).cells
    assert cells[-4:] == ["0", f"{EVIL}: {EVIL}", "a", EVIL]
    assert read(OutputList([completion(EVIL)])._repr_html_()).cells[-4:] == ["0", EVIL, "3", "eos"]
    assert read(OutputList()._repr_html_()).cells == ["0 outputs"]


def test_a_directions_health_is_a_table():
    d = Direction(EVIL, D.vectors, D.scale, health={"contrast": [0.1] * 6, EVIL: [0.5] * 6}, metadata={"a": EVIL})
    cells = read(d[2:4]._repr_html_()).cells
    assert EVIL in cells[0]
    assert cells[1:5] == ["block", "scale", "contrast", EVIL]
    assert cells[5:] == ["2", "1.000", "0.100", "0.500", "3", "1.000", "0.100", "0.500"]
    read(D._repr_html_())


def test_results_of_a_runtime_are_such_lists_and_still_lists():
    rt = Runtime(tiny_llama(), tiny_tokenizer(), page_size=8, device="cpu")
    prompts = random_prompts([4, 5])
    completions = rt.generate(prompts, max_new_tokens=2)
    pairs = rt.generate_pairs(prompts, positive=None, negative=None, max_new_tokens=2)
    branches = rt.generate_branches(prompts, [None], max_new_tokens=2)
    for outputs in (completions, pairs, branches):
        assert isinstance(outputs, list)
        assert "<table>" in outputs._repr_html_()
        assert copy.deepcopy(outputs) == outputs == list(outputs) == pickle.loads(pickle.dumps(outputs))
    assert json.loads(json.dumps([c.token_ids for c in completions])) == [c.token_ids for c in completions]
    with rt.prefix([1, 2, 3]) as prefix:
        assert repr(prefix) == "Prefix(3 tokens, pinned)"
    assert repr(prefix) == "Prefix(3 tokens, not pinned)"
