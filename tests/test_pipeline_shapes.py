"""What is written per prompt: pairs, ternary records, ladders, several criteria, shared beginnings.

Every record is held against the engine itself, which is asked again for each response alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from icon2_rt import Direction, DirectionSet, Runtime
from icon2_rt.pipeline import dataset, pairs
from icon2_rt.pipeline.config import PairsConfig, RunConfig
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.pairs import Kept, Strengths
from icon2_rt.pipeline.sampling import stage_seed
from icon2_rt.pipeline.templates import ChatFrame, chat_frame
from tests.models import VOCAB, random_vectors, tiny_llama, tiny_tokenizer

EOS = (1,)
STRENGTHS = Strengths(dict.fromkeys(("kind", "brief"), 2.0), dict.fromkeys(("kind", "brief"), -1.0), (1, 2), (1.0, 1.0))
KEPT = [
    Kept(Instruction(7, "Why?"), "kind", 0.5, 0.1, {"kind": 0.5, "brief": 0.4}),
    Kept(Instruction(9, "How is the weather?"), "brief", 0.7, 0.2, {"kind": 0.5, "brief": 0.7}),
    Kept(Instruction(12, "Sing."), "kind", 0.9, 0.3, {"kind": 0.9, "brief": 0.6}),
]


@pytest.fixture(scope="module")
def rt() -> Runtime:
    llama = tiny_llama(eos_token_id=1, bos_token_id=0, pad_token_id=0)
    with torch.no_grad():
        llama.lm_head.weight[[0, 2, 3, 4]] = 0  # the other special tokens: rarer than the rest
    return Runtime(llama, tiny_tokenizer(), kv_memory="32MiB")


@pytest.fixture(scope="module")
def frame(rt: Runtime) -> ChatFrame:
    return chat_frame(rt.tokenizer, EOS)


@pytest.fixture(scope="module")
def bank() -> DirectionSet:
    found = []
    for seed, name in enumerate(("kind", "brief")):
        vectors = random_vectors(4, 48, seed=seed)
        found.append(Direction(name, vectors / vectors.norm(dim=1, keepdim=True), scale=torch.ones(4)))
    return DirectionSet(found)


def _decode(rt: Runtime, frame: ChatFrame, bank: DirectionSet, **options: Any) -> list[dict[str, Any]]:
    config = dataclasses.replace(PairsConfig(max_new_tokens=20), **options)
    return pairs.decode(rt, frame, KEPT, bank, STRENGTHS, config, EOS, seed=3)


def _again(
    rt: Runtime, record: dict[str, Any], steering: Any, seed: int, start: list[int] | None = None, eos: Any = EOS
) -> str:
    """One response alone, from what its record says."""
    prompt = [*rt.encode(record["prompt"]), *(start or [])]
    sampling = pairs.response_sampling(PairsConfig(max_new_tokens=20 - 6 * bool(start is not None)), eos)
    [completion] = rt.generate([prompt], steering, seed=[seed], generation_config=sampling)
    return rt.tokenizer.decode([*(start or []), *completion.token_ids], skip_special_tokens=True)  # type: ignore


def test_log_probabilities_are_the_unsteered_model_s(rt: Runtime, frame: ChatFrame, bank: DirectionSet) -> None:
    """Sum, mean, and per token on request, against one forward pass of transformers."""
    from torch.nn.functional import log_softmax

    model = tiny_llama(eos_token_id=1, bos_token_id=0, pad_token_id=0)
    with torch.no_grad():
        model.lm_head.weight[[0, 2, 3, 4]] = 0
    sampling = pairs.response_sampling(PairsConfig(max_new_tokens=20), EOS)
    for record in _decode(rt, frame, bank, per_token=True):
        prompt = rt.encode(record["prompt"])
        for side, strength in (("chosen", 2.0), ("rejected", -1.0)):
            steering = strength * bank[record["criterion"]][1:3]
            seed = [record[f"{side}_seed"]]
            [completion] = rt.generate([record["prompt"]], steering, seed=seed, generation_config=sampling)
            assert completion.text == record[side][0]["content"]
            ids = completion.token_ids
            assert record[f"{side}_tokens"] == len(ids)
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
            expected = log_softmax(logits, dim=-1)
            chosen = expected[range(len(ids)), ids]
            entropy = -(expected.exp() * expected).sum(dim=-1)
            assert record[f"{side}_token_logprobs"] == pytest.approx(chosen.tolist(), abs=1e-3)
            assert record[f"{side}_token_entropies"] == pytest.approx(entropy.tolist(), abs=1e-3)
            assert record[f"{side}_logprob_unsteered"] == pytest.approx(float(chosen.sum()), abs=1e-3)
            assert record[f"{side}_logprob_unsteered_mean"] == pytest.approx(float(chosen.mean()), abs=1e-3)
            assert record[f"{side}_entropy"] == pytest.approx(float(entropy.mean()), abs=1e-3)
            assert record[f"{side}_logprob"] == pytest.approx(sum(completion.logprobs), abs=1e-3)
            assert record[f"{side}_logprob"] != pytest.approx(float(chosen.sum()), abs=0.1)  # that one is steered


def test_a_pair_is_what_the_runtime_s_pairs_are(rt: Runtime, frame: ChatFrame, bank: DirectionSet) -> None:
    records = _decode(rt, frame, bank)
    assert [r["id"] for r in records] == [7, 9, 12]
    outputs = rt.generate_pairs(
        [r["prompt"] for r in records],
        positive=[2.0 * bank[k.criterion][1:3] for k in KEPT],
        negative=[-1.0 * bank[k.criterion][1:3] for k in KEPT],
        seed=stage_seed(3, "pairs"),
        sample_ids=[7, 9, 12],
        generation_config=pairs.response_sampling(PairsConfig(max_new_tokens=20), EOS),
    )
    for record, output in zip(records, outputs, strict=True):
        assert {key: record[key] for key in ("prompt", "chosen", "rejected")} == output.to_preference()
        assert set(record) == set(dataset.COLUMNS)


def test_three_branches(rt: Runtime, frame: ChatFrame, bank: DirectionSet) -> None:
    for record in _decode(rt, frame, bank, shape="ternary"):
        assert record["neutral"][0]["content"] == _again(rt, record, None, record["neutral_seed"])
        assert record["neutral_logprob"] == pytest.approx(record["neutral_logprob_unsteered"], abs=1e-3)
        steering = 2.0 * bank[record["criterion"]][1:3]
        assert record["chosen"][0]["content"] == _again(rt, record, steering, record["chosen_seed"])


def test_a_ladder_goes_down_in_even_steps(rt: Runtime, frame: ChatFrame, bank: DirectionSet) -> None:
    for record in _decode(rt, frame, bank, shape="ladder", rungs=4):
        assert record["strengths"] == pytest.approx([2.0, 1.0, 0.0, -1.0])
        assert record["weights"] == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0])
        assert (record["responses"][0], record["responses"][-1]) == (record["chosen"], record["rejected"])
        assert record["responses_seed"][0] == record["chosen_seed"]
        for response, strength, seed in zip(
            record["responses"], record["strengths"], record["responses_seed"], strict=True
        ):
            steering = strength * bank[record["criterion"]][1:3] if strength else None
            assert response[0]["content"] == _again(rt, record, steering, seed)


def test_each_criterion_gets_a_record_of_its_own(rt: Runtime, frame: ChatFrame, bank: DirectionSet) -> None:
    records = _decode(rt, frame, bank, directions="each")
    assert [(r["id"], r["criterion"]) for r in records] == [(i, c) for i in (7, 9, 12) for c in ("kind", "brief")]
    assert [r["score"] for r in records] == [0.5, 0.4, 0.5, 0.7, 0.9, 0.6]
    assert [r["margin"] for r in records] == [0.1, None, None, 0.2, 0.3, None]
    for record in records:
        steering = -1.0 * bank[record["criterion"]][1:3]
        assert record["rejected"][0]["content"] == _again(rt, record, steering, record["rejected_seed"])


@pytest.mark.parametrize("weights", [{}, {"brief": 0.5, "kind": -2.0}])
def test_several_directions_in_one_steering(
    rt: Runtime, frame: ChatFrame, bank: DirectionSet, weights: dict[str, float]
) -> None:
    for record in _decode(rt, frame, bank, directions="sum", weights=weights):
        assert record["criterion"] == ("brief+kind" if weights else "kind+brief")
        given = weights or {"kind": 1.0, "brief": 1.0}
        steering = sum(w * 2.0 * bank[name][1:3] for name, w in given.items())
        assert record["chosen"][0]["content"] == _again(rt, record, steering, record["chosen_seed"])


def test_branches_part_after_a_shared_unsteered_beginning(rt: Runtime, frame: ChatFrame, bank: DirectionSet) -> None:
    """A draft that ends early gives the first half of what stands before its ending token. Here a token in six ends a
    response, so that drafts have every length."""
    ending = tuple(range(10, 10 + VOCAB // 6))
    items = [dataclasses.replace(KEPT[n % 3], instruction=Instruction(n, f"Why {n}?")) for n in range(16)]
    options = {"shared_tokens": 6, "noise": "common", "shape": "ternary", "max_new_tokens": 20}
    halves = set()
    for record in pairs.decode(rt, frame, items, bank, STRENGTHS, PairsConfig(**options), ending, seed=3):
        n = record["shared_tokens"]
        assert record["first_difference"] is None or record["first_difference"] >= n
        sampling = pairs.response_sampling(PairsConfig(max_new_tokens=6), ending)
        [start] = rt.generate([record["prompt"]], seed=[record["shared_seed"]], generation_config=sampling)
        start_ids = start.token_ids[:n]
        if start.finish_reason == "length":
            assert n == 6
        else:
            *said, last = start.token_ids
            assert last in ending
            assert n in (len(said) / 2, (len(said) - 1) / 2)
            halves.add((n, len(said)))
        for side, strength in (("chosen", 2.0), ("rejected", -1.0)):
            steering = strength * bank[record["criterion"]][1:3]
            assert record[side][0]["content"] == _again(rt, record, steering, record[f"{side}_seed"], start_ids, ending)
            assert record[f"{side}_tokens"] <= 20
        # The beginning counts like the rest: it is part of the response that the unsteered model is asked about.
        assert record["neutral_logprob"] == pytest.approx(record["neutral_logprob_unsteered"], abs=1e-3)
    assert {len_ % 2 for n, len_ in halves if n} == {0, 1}  # odd lengths and even ones, of which something was left


def test_common_noise_makes_pairs_part_later(rt: Runtime, frame: ChatFrame, bank: DirectionSet) -> None:
    weak = dataclasses.replace(
        STRENGTHS, positive={"kind": 0.1, "brief": 0.1}, negative={"kind": -0.05, "brief": -0.05}
    )
    config = PairsConfig(max_new_tokens=20)

    def parting(noise: Any) -> int:
        made = pairs.decode(rt, frame, KEPT, bank, weak, dataclasses.replace(config, noise=noise), EOS, seed=3)
        return sum(20 if r["first_difference"] is None else r["first_difference"] for r in made)

    assert parting("common") > parting("independent")


@pytest.mark.parametrize(
    "options",
    [{}, {"per_token": True}, {"shape": "ternary", "per_token": True}, {"shape": "ladder"}, {"shared_tokens": 4}],
)
def test_parquet_keeps_every_shape(rt: Runtime, frame: ChatFrame, bank: DirectionSet, options: dict[str, Any]) -> None:
    records = _decode(rt, frame, bank, **options)
    back = dataset.from_parquet(dataset.to_parquet(records))
    described = dataset.columns_of(records[0])
    for before, after in zip(records, back, strict=True):
        assert set(before) == set(after) == set(described)
        for name, value in before.items():
            assert after[name] == (pytest.approx(value, rel=1e-6) if "token_" in name else value), name


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rungs": 7}, r'pairs\.rungs: has no effect with pairs\.shape = "pair"'),
        ({"shape": "ladder", "rungs": 1}, r"pairs\.rungs: must be at least 2"),
        ({"weights": {"kind": 1.0}}, r'pairs\.weights: they need pairs\.directions = "sum"'),
        ({"directions": "sum", "weights": {"kin": 1.0}}, r"weights\.kin: there is no such criterion .*'kind'"),
        ({"directions": "sum", "weights": {"kind": 0}}, r"weights\.kind: must not be 0"),
        ({"directions": "sum", "weights": {"kind": "a"}}, r"weights\.kind: must be a number"),
        ({"shared_tokens": 64, "max_new_tokens": 64}, r"shared_tokens: must be less than max_new_tokens \(64\)"),
        ({"shape": "triple"}, r"pairs\.shape: must be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(section: dict[str, Any], message: str) -> None:
    criteria = {"kind": {"positive": "Be kind.", "negative": "Be cruel."}}
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict({"model": "m", "criteria": criteria, "pairs": section})
