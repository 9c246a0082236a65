"""The recipes that the method is compared with, each against the engine and the judge asked again by themselves."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from icon2_rt import Runtime
from icon2_rt.pipeline import baselines, dataset
from icon2_rt.pipeline.config import BaselineConfig, PairsConfig, RunConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.judges import RewardModel, load_judge, verdicts
from icon2_rt.pipeline.loading import end_tokens
from icon2_rt.pipeline.pairs import response_sampling
from icon2_rt.pipeline.runner import run
from icon2_rt.pipeline.sampling import stage_seed
from icon2_rt.pipeline.templates import chat_frame
from icon2_rt.tiny import CRITERIA, oracle, path
from tests import noise
from tests.models import tiny_llama, tiny_tokenizer
from tests.test_cli import Icon2, icon2  # noqa: F401  # the fixture

EOS = (1,)
ITEMS = [Instruction(4, "Why?"), Instruction(7, "How is it?"), Instruction(8, "Sing.")]
PAIRS = PairsConfig(max_new_tokens=16)
TWO = {"kind": Criterion("Be kind.", "Be cruel."), "brief": Criterion("Be brief.", "Ramble.")}
JUDGE = "def most_e(instructions, responses):\n    return [r.count('e') + 0.01 * len(r) for r in responses]\n"


def _runtime(only: str | None = None) -> Runtime:
    """A random Llama; with ``only`` it writes little but those characters (an even number of them)."""
    llama = tiny_llama(eos_token_id=1, bos_token_id=0, pad_token_id=0)
    with torch.no_grad():
        llama.lm_head.weight[[0, 2, 3, 4]] = 0
        if only is not None:
            ids = tiny_tokenizer().convert_tokens_to_ids(list(only))
            llama.model.norm.weight.fill_(1.0)
            rows = 1.2 * torch.randn(len(ids) // 2, 48, generator=torch.Generator().manual_seed(0))
            llama.lm_head.weight.zero_()
            llama.lm_head.weight[ids] = torch.cat([rows, -rows])  # wherever the state is, one of them is far above 0
    return Runtime(llama, tiny_tokenizer(), kv_memory="32MiB")


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return _runtime()


def _make(
    rt: Runtime, recipe: str, judge: Any = None, given: Any = (None,) * 3, pairs: PairsConfig = PAIRS, **options: Any
) -> Any:
    config = BaselineConfig(recipe, **options)  # type: ignore[arg-type]
    frame = chat_frame(rt.tokenizer, EOS)
    return baselines.make(rt, frame, ITEMS, given, config, pairs, TWO, EOS, 3, judge)


def _again(rt: Runtime, prompt: Any, seed: int) -> str:
    [completion] = rt.generate([prompt], seed=[seed], generation_config=response_sampling(PAIRS, EOS))
    return completion.text or ""


def test_best_of_n_takes_the_judge_s_best_and_worst(rt: Runtime) -> None:
    asked: list[tuple[str, str]] = []

    def judge(instructions: Any, responses: Any) -> list[float]:
        asked.extend(zip(instructions, responses, strict=True))
        return [len(r) for r in responses]

    records, dropped = _make(rt, "best_of_n", judge, samples=4)
    assert len(records) + dropped["tied"] == 3
    assert len(asked) == 12
    for record in records:
        [prompt] = record["prompt"]
        lengths = [len(response) for instruction, response in asked if instruction == prompt["content"]]
        assert len(lengths) == 4
        assert record["chosen_reward"] == max(lengths) == len(record["chosen"][0]["content"])
        assert record["rejected_reward"] == min(lengths) == len(record["rejected"][0]["content"])
        assert record["chosen"][0]["content"] == _again(rt, record["prompt"], record["chosen_seed"])
        assert set(record) == {*dataset.COLUMNS, "chosen_reward", "rejected_reward"}
        assert record["strength_positive"] is None
        assert record["chosen_logprob"] == pytest.approx(record["chosen_logprob_unsteered"], abs=1e-3)


def test_equal_verdicts_make_no_pair(rt: Runtime) -> None:
    records, dropped = _make(rt, "best_of_n", lambda i, r: [1.0] * len(r))
    assert (records, dropped) == ([], {"tied": 3})


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda i, r: [math.nan] * len(r), "the judge gave nan to a response"),
        (lambda i, r: [math.inf] * len(r), "must be a finite number"),
        (lambda i, r: [1.0], "gave 1 verdicts on 15 responses"),
    ],
)
def test_a_judge_that_fails_is_named(rt: Runtime, judge: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _make(rt, "best_of_n", judge)


def test_a_model_grades_itself_by_votes() -> None:
    rt = _runtime(only="1 x54.")
    frame = chat_frame(rt.tokenizer, EOS)
    recipe = baselines._Recipe(rt, frame, BaselineConfig("self_rewarding", votes=3), PAIRS, TWO, EOS, 3)
    samples = recipe.sample(ITEMS)
    grades = recipe.graded(ITEMS, samples)
    assert all(len(several) == 5 for several in grades)
    flat = [grade for several in grades for grade in several if grade is not None]
    assert len(flat) >= 10
    assert all(1 <= grade <= 5 for grade in flat)
    assert any(grade != int(grade) for grade in flat)  # means of votes that differ
    records, dropped = _make(rt, "self_rewarding", votes=3)
    assert len(records) + sum(dropped.values()) == 3
    for record in records:
        several = grades[[item.id for item in ITEMS].index(record["id"])]
        rated = [grade for grade in several if grade is not None]
        assert (record["chosen_reward"], record["rejected_reward"]) == (max(rated), min(rated))


@pytest.mark.parametrize(
    ("text", "grade"),
    [("4", 4), (" 3.", 3), ("Grade: 5", 5), ("4/5", 4), ("10", None), ("4.5", None), ("0", None), ("good", None)],
)
def test_reading_a_grade(text: str, grade: int | None) -> None:
    assert baselines.read_grade(text) == grade


def test_what_cannot_grade_makes_no_pair() -> None:
    records, dropped = _make(_runtime(only="abcd"), "self_rewarding")
    assert (records, dropped) == ([], {"ungraded": 3})


def test_likelihood_under_opposite_prompts(rt: Runtime) -> None:
    records, _ = _make(rt, "self_rewarding", self_judge="likelihood")
    assert records
    for record in records:
        for side in ("chosen", "rejected"):
            text = record[side][0]["content"]
            response = rt.generate(
                [record["prompt"]], seed=[record[f"{side}_seed"]], generation_config=response_sampling(PAIRS, EOS)
            )
            assert response[0].text == text
            per_criterion = []
            for criterion in TWO.values():
                under = [
                    fmean(rt.score([[{"role": "system", "content": system}, *record["prompt"]]], response)[0].logprobs)
                    for system in (criterion.positive, criterion.negative)
                ]
                per_criterion.append(under[0] - under[1])
            assert record[f"{side}_reward"] == pytest.approx(fmean(per_criterion), abs=1e-3)
        assert record["chosen_reward"] > record["rejected_reward"]


def test_a_refinement_has_the_drafts_before_it(rt: Runtime) -> None:
    """Drafts of these weights are short, or the prompt would not fit into 512 positions."""
    records, dropped = _make(rt, "self_refine", samples=2)
    assert len(records) + dropped["too long"] == 3
    assert records
    for record in records:
        assert record["rejected"][0]["content"] == _again(rt, record["prompt"], record["rejected_seed"])
        assert record["chosen"][0]["content"] != _again(rt, record["prompt"], record["chosen_seed"])
        recipe = baselines._Recipe(
            rt, chat_frame(rt.tokenizer, EOS), BaselineConfig("self_refine", samples=2), PAIRS, TWO, EOS, 3
        )
        [drafts] = [s for item, s in zip(ITEMS, recipe.sample(ITEMS), strict=True) if item.id == record["id"]]
        assert drafts[0].text == record["rejected"][0]["content"]
        asked = baselines.REFINE.format(
            instruction=record["prompt"][0]["content"],
            n=2,
            drafts="\n\n".join(f"Draft {k}: {draft.text}" for k, draft in enumerate(drafts, start=1)),
        )
        assert record["chosen"][0]["content"] == _again(rt, [{"role": "user", "content": asked}], record["chosen_seed"])


@pytest.mark.parametrize("common", [False, True])
def test_opposing_prompts(rt: Runtime, common: bool) -> None:
    """Each side with random numbers of its own, or both with the same, by the instruction's id."""
    config = dataclasses.replace(PAIRS, noise="common" if common else "independent")
    records, _ = _make(rt, "opposing_prompts", given=(None, "kind", "brief"), pairs=config)
    for side, stage in (("chosen", "pairs/positive"), ("rejected", "pairs/negative")):
        base = stage_seed(3, "pairs" if common else stage)
        assert [r[f"{side}_seed"] for r in records] == [noise.row_seed(base, item.id, 0) for item in ITEMS]
    assert all((r["chosen_seed"] == r["rejected_seed"]) == common for r in records)
    assert [r["criterion"] for r in records] == ["kind", "kind", "brief"]  # 4 is even: the first of two by turns
    for record in records:
        criterion = TWO[record["criterion"]]
        for side, system in (("chosen", criterion.positive), ("rejected", criterion.negative)):
            prompt = [{"role": "system", "content": system}, *record["prompt"]]
            assert record[side][0]["content"] == _again(rt, prompt, record[f"{side}_seed"])


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    _save_classifier(folder, 1)
    return folder


def _save_classifier(folder: Path, labels: int, **options: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_labels=labels, pad_token_id=5, initializer_range=0.5, **options,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    _save_padding_tokenizer(folder)


def _save_padding_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(folder)


def test_a_reward_model_reads_each_chat_as_if_alone(reward_model: Path) -> None:
    judge = RewardModel.load(str(reward_model))
    instructions = ["Why?"] * 11
    responses = ["a" * n for n in range(1, 12)]
    together = verdicts(judge, instructions, responses)
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    total = 0
    for instruction, response, verdict in zip(instructions, responses, together, strict=True):
        text = f"<|bos|><|user|>{instruction}<|end|><|assistant|>{response}<|end|>"
        ids = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
        total += len(ids)
        assert verdict == pytest.approx(model(torch.tensor([ids])).logits[0, 0].item(), abs=1e-4)
    assert judge.tokens == total
    assert judge.parameters == sum(p.numel() for p in model.parameters())


def test_padding_tells_a_reward_model_nothing(tmp_path: Path) -> None:
    """One whose attention looks both ways would read it, if it were not masked."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        pad_token_id=5, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    _save_padding_tokenizer(tmp_path)
    judge = RewardModel.load(str(tmp_path))
    responses = ["a" * n for n in range(1, 30, 3)]
    together = verdicts(judge, ["Why?"] * 10, responses)
    alone = [judge(["Why?"], [response])[0] for response in responses]
    assert together == pytest.approx(alone, abs=1e-5)
    text = f"<|bos|><|user|>Why?<|end|><|assistant|>{responses[0]}<|end|>"
    ids = torch.tensor([judge.tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert alone[0] == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-5)
    assert max(alone) - min(alone) > 1e-3


def test_wrong_reward_models(reward_model: Path, tmp_path: Path) -> None:
    _save_classifier(tmp_path / "two", 2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(ValueError, match=r"has 2 labels \(bad, good\): name the one that means good"):
        RewardModel.load(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="has no label 'fine', only bad, good"):
        RewardModel.load(str(tmp_path / "two"), "fine")
    judge, other = RewardModel.load(str(tmp_path / "two"), "good"), RewardModel.load(str(tmp_path / "two"), "bad")
    assert judge(["Why?"], ["So."]) != other(["Why?"], ["So."])
    with pytest.raises(ValueError, match="is no reward model: its architecture is LlamaForCausalLM"):
        RewardModel.load(str(path()))


def _config(folder: Path, **baseline: Any) -> RunConfig:
    (folder / "judge.py").write_text(JUDGE)
    table = {
        "model": "tiny",
        "runtime": {"threads": 1, "kv_memory": "64MiB"},
        "instructions": {"draws": 12, "max_new_tokens": 48, "shard_size": 8},
        "pairs": {"max_new_tokens": 32, "shard_size": 5},
        "baseline": baseline,
    }
    return RunConfig.from_dict(table, folder=folder)


@pytest.mark.parametrize(
    "baseline",
    [
        {"recipe": "best_of_n", "judge": "judge.py:most_e"},
        {"recipe": "self_rewarding", "self_judge": "likelihood", "samples": 3},
        {"recipe": "self_refine"},
        {"recipe": "opposing_prompts"},
    ],
    ids=lambda baseline: baseline["recipe"],
)
def test_a_baseline_is_a_run_like_any_other(tmp_path: Path, baseline: dict[str, Any]) -> None:
    """Its folder is a dataset; half of it lost, it is made again to the same bytes."""
    config = _config(tmp_path, **baseline)
    result = run(config, tmp_path / "run")
    records = list(result.records())
    assert len(records) == result.report["counts"]["pairs"] >= 5
    assert {record["id"] for record in records} <= set(range(1024, 1036))  # the draws that the method would have seen
    timed = ("log.jsonl", "report.html")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name not in timed}
    (tmp_path / "run/data/shard-00001.parquet").unlink()
    (tmp_path / "run/report.json").unlink()
    run(config, tmp_path / "run")
    assert {p: p.read_bytes() for p in before} == before
    if "judge" in baseline:  # what is in the judge's file is a part of what the run is
        (tmp_path / "judge.py").write_text(JUDGE.replace("0.01", "0.02"))
        with pytest.raises(ValueError, match=r"files\.baseline\.judge"):
            run(config, tmp_path / "run")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(tmp_path / "run"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == records


def test_opposing_prompts_teach_the_shipped_model_s_world() -> None:
    """The oracle of its world finds the responses under positive prompts better."""
    rt = Runtime.from_pretrained(path())
    frame = chat_frame(rt.tokenizer, end_tokens(rt))
    completions = rt.generate([list(frame.pre_query)] * 40, seed=0, max_new_tokens=48, temperature=1.0)
    items = [Instruction(i, c.text.strip()) for i, c in enumerate(completions) if c.finish_reason == "eos" and c.text]
    criteria = {name: Criterion(*prompts) for name, prompts in CRITERIA.items() if name == "general"}
    records, _ = baselines.make(
        rt, frame, items, [None] * len(items), BaselineConfig("opposing_prompts"), PairsConfig(max_new_tokens=64),
        criteria, end_tokens(rt), 0,
    )  # fmt: skip
    scores = [
        [oracle.judge(r["prompt"][0]["content"], r[side][0]["content"]).score for side in ("chosen", "rejected")]
        for r in records
    ]
    assert fmean(c for c, _ in scores) > fmean(r for _, r in scores) + 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": {"recipe": "best_of_n"}}, r"baseline\.judge: best_of_n needs one"),
        ({"baseline": {"recipe": "best_of_n", "judge": "none.py:f"}}, r"baseline\.judge: there is no file"),
        ({"baseline": {}}, r"baseline\.recipe: is missing"),
        ({"baseline": {"recipe": "best_of_n", "judge": "a:f", "samples": 1}}, "needs at least 2"),
        ({"baseline": {"recipe": "self_refine"}, "pairs": {"positive": 0.2}}, r"pairs\.positive: has no effect with"),
        ({"baseline": {"recipe": "self_refine"}, "calibration": {}}, "calibration: has no effect"),
        (
            {"baseline": {"recipe": "self_rewarding"}, "pairs": {"temperature": 0}},
            r"pairs\.temperature: self_rewarding chooses among samples, which are all the same at 0",
        ),
        (
            {"baseline": {"recipe": "self_refine"}, "pairs": {"noise": "common"}},
            r"pairs\.noise: has no effect with self_r",
        ),
        ({"baseline": {"recipe": "self_refine"}, "filter": {"keep": 0.5}}, r"filter\.keep: has no effect"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict({"model": "tiny", **changes})


def test_the_command(icon2: Icon2, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "given.txt").write_text("Why?\nHow?\n")
    (tmp_path / "b.toml").write_text(
        'model = "tiny"\n[instructions]\nfile = "given.txt"\n[pairs]\nmax_new_tokens = 16\n'
        '[baseline]\nrecipe = "opposing_prompts"\n'
    )
    code, out, err = icon2("run", tmp_path / "b.toml", "--out", tmp_path / "run")
    assert code == 0, err
    assert "opposing_prompts" in out
    assert "2 pairs" in out


def test_a_checkpoint_without_its_head_is_no_reward_model(reward_model: Path, tmp_path: Path) -> None:
    """transformers would draw the missing weights at random, and say so in a line that nobody reads."""
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for score\.weight: .* its verdicts would be random"):
        RewardModel.load(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1.0, float('inf')]", "the judge gave inf to a response"),
        ("['high', 'low']", "a number for each response"),
        ("None", "a number for each response"),
        ("1 / 0", "the judge raised ZeroDivisionError"),
        ("[1.0]", "1 verdicts on 2 responses"),
    ],
)
def test_a_judge_is_tried_before_the_work(given: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def judge(instructions, responses):\n    return {given}\n")
    with pytest.raises(ValueError, match=f"^baseline.judge: .*{message}"):
        load_judge(f"{tmp_path / 'mine.py'}:judge", None, "cpu", "baseline.judge")


def test_arrays_are_verdicts_too(reward_model: Path) -> None:
    assert verdicts(lambda i, r: torch.tensor([1.0, 2.0]), ["a", "b"], ["c", "d"]) == [1.0, 2.0]  # type: ignore[arg-type, return-value]
    judge = load_judge(str(reward_model), None, "cpu", "baseline.judge")
    assert isinstance(judge, RewardModel)
    assert judge.tokens == 0  # that it was tried is no cost of the recipe
