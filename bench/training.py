"""Does training on the pairs make the shipped model better, and what do the pairs cost? The method beside the four
baselines, on the same instructions and the same engine, judged by the world's oracle.

5. Training: DPO with TRL on each dataset, with several seeds; the oracle's mean score of the trained model's unsteered
   answers to instructions of the world, and the curve of the reward accuracy.
6. Costs: what a pair of each dataset cost, in three accountings; and steered beside unsteered decoding.

best_of_n asks the oracle itself: no reward model can be better. Everything else never sees it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment, write
from icon2_rt import Runtime, tiny
from icon2_rt.pipeline import costs
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.runner import RunResult, finished_run, run
from icon2_rt.tiny import oracle, world

# The strengths are doses of this model's residual norm, in the band that steers it best.
STEERED = {"unit": "dose", "positive": 0.15, "negative": -0.2, "layers": "1:5"}
ANSWERS = {"max_new_tokens": 64, "temperature": 0.8, "top_p": 0.95}
BASELINES: Mapping[str, Mapping[str, Any]] = {
    "opposing_prompts": {},
    "best_of_n": {"judge": "bench.training:verdicts"},
    "self_rewarding": {"self_judge": "likelihood"},
    "self_refine": {},
}
# A model of 1.1M parameters takes a far larger step than the paper's 5e-7, and a dataset this small smaller batches.
TRAINING = {"beta": 0.1, "learning_rate": 3e-4, "batch": 16, "epochs": 2}
TIMED = 5  # how often steered and unsteered decoding are timed, by turns


def verdicts(instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The oracle as a judge."""
    return [oracle.judge(i, r).score for i, r in zip(instructions, responses, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench training", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=500, help="instructions that the model writes; half are kept")
    parser.add_argument("--asked", type=int, default=200, help="instructions that the trained models answer")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each dataset")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument(
        "--runs", type=Path, help="a folder to keep the runs in; finished ones there are taken as they are"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/training-tiny-DEVICE.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = datasets(options.runs or Path(folder), options.draws, options.baselines)
        asked = instructions(options.asked)
        before = marks(Runtime.from_pretrained(tiny.path()), asked)
        record = {
            "benchmark": "training",
            "model": {"name": "tiny"},
            "settings": {**vars(options), "out": None, "runs": None, "training": TRAINING, "pairs": STEERED | ANSWERS},
            "environment": environment(),
            "untrained": before,
            "trained": {name: trained(result, asked, options.seeds) for name, result in runs.items()},
            "costs": {unit: costs.compare(runs["icon2"], list(runs.values())[1:], unit) for unit in costs.UNITS},
            "ratio": costs.ratio(runs["icon2"]),
            "steered_over_unsteered": overhead(runs["icon2"]),
            "seconds": round(time.perf_counter() - began, 1),
        }
    write("training-tiny", record, options.out)


def datasets(folder: Path, draws: int, names: Sequence[str]) -> dict[str, RunResult]:
    """The method's run, and each baseline's on the instructions that it kept."""
    common = {"model": "tiny", "runtime": {"threads": 1, "kv_memory": "256MiB"}}
    method = {
        **common,
        "directions": {"features": 128},
        "instructions": {"draws": draws, "max_new_tokens": 48},
        "filter": {"scale": "contrast", "keep": 0.5},
        "pairs": {**STEERED, **ANSWERS},
    }
    runs = {"icon2": _timed("icon2", method, folder)}
    given = {"file": str(folder / "icon2" / "kept.jsonl")}
    for name in names:
        table = {**common, "instructions": given, "pairs": ANSWERS, "baseline": {"recipe": name, **BASELINES[name]}}
        runs[name] = _timed(name, table, folder)
    return runs


def _timed(name: str, table: Mapping[str, Any], folder: Path) -> RunResult:
    if (folder / name / "report.json").exists():
        return finished_run(folder / name)
    began = time.perf_counter()
    result = run(RunConfig.from_dict(table), folder / name)
    print(f"{name}: {result.report['counts']['pairs']} pairs, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return result


def instructions(count: int) -> list[str]:
    """Instructions of the world that no dataset is made of: drawn from it, not from the model."""
    rng = random.Random(1)
    return [getattr(text, "text", text) for text in (world.sample_instruction(rng) for _ in range(count))]


def marks(rt: Runtime, asked: Sequence[str]) -> dict[str, float]:
    """The oracle on unsteered answers, with the same random numbers for every model."""
    chats = [[{"role": "user", "content": text}] for text in asked]
    answers = rt.generate(chats, seed=7, top_k=0, **ANSWERS)
    judged = [oracle.judge(text, answer.text or "") for text, answer in zip(asked, answers, strict=True)]
    return {
        "score": statistics.fmean(verdict.score for verdict in judged),
        "well_formed": statistics.fmean(verdict.well_formed for verdict in judged),
    }


def trained(result: RunResult, asked: Sequence[str], seeds: int) -> dict[str, Any]:
    """One dataset, trained on with each seed."""
    found = []
    for seed in range(seeds):
        began = time.perf_counter()
        model, tokenizer, curve = _train(result, seed)
        found.append({**marks(Runtime(model, tokenizer), asked), "reward_accuracy": curve})
        took = time.perf_counter() - began
        print(f"{result.path.name}, seed {seed}: {found[-1]['score']:.3f} in {took:.0f} s", file=sys.stderr)
    scores = [f["score"] for f in found]
    by_oracle = _pairs_by_oracle(result)
    return {
        "pairs": result.report["counts"]["pairs"],
        "oracle": by_oracle,
        "mean": statistics.fmean(scores),
        "spread": statistics.stdev(scores) if seeds > 1 else None,
        "seeds": found,
    }


def _pairs_by_oracle(result: RunResult) -> dict[str, float]:
    """What the oracle thinks of the pairs: both well formed; of those that differ in score, chosen better."""
    judged = [
        [oracle.judge(r["prompt"][0]["content"], r[side][0]["content"]) for side in ("chosen", "rejected")]
        for r in result.records()
    ]
    both = [(c, r) for c, r in judged if c.kind is not None and c.well_formed and r.well_formed]
    differ = [(c, r) for c, r in both if c.score != r.score]
    return {
        "both_well_formed": len(both) / len(judged),
        "chosen_better": sum(c.score > r.score for c, r in differ) / max(1, len(differ)),
    }


def _train(result: RunResult, seed: int) -> tuple[Any, Any, list[tuple[int, float]]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [
        {key: record[key] for key in ("prompt", "chosen", "rejected")}
        for record in result.records()
        if record["chosen"] != record["rejected"]
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    steps = int(TRAINING["epochs"] * len(rows) / TRAINING["batch"])
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, beta=TRAINING["beta"], learning_rate=TRAINING["learning_rate"],
            lr_scheduler_type="cosine", warmup_steps=round(0.1 * steps), num_train_epochs=TRAINING["epochs"],
            per_device_train_batch_size=int(TRAINING["batch"]), logging_steps=5, save_strategy="no", report_to=[],
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=seed, data_seed=seed,
        )  # fmt: skip
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny.path()),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    curve = [(e["step"], e["rewards/accuracies"]) for e in trainer.state.log_history if "rewards/accuracies" in e]
    return trainer.model, tokenizer, curve


def overhead(result: RunResult) -> dict[str, float]:
    """Seconds a decoded token of pairs, over the same without steering; turns alternate, medians are compared."""
    from icon2_rt import DirectionSet

    rt = Runtime.from_pretrained(tiny.path(), kv_memory="256MiB")
    direction = next(iter(DirectionSet.load(result.path / "directions.safetensors")))
    chats = [record["prompt"] for record in result.records()][:32]
    push = 0.01 * direction[1:5]  # too small to change how long the answers are
    found: dict[str, list[float]] = {"steered": [], "unsteered": []}
    for turn in range(2 * TIMED + 2):
        name = ("steered", "unsteered")[turn % 2]
        sides = [push, -1 * push] if name == "steered" else [None, None]
        began = time.perf_counter()
        outputs = rt.generate_branches(chats, sides, seed=turn // 2, top_k=0, **ANSWERS)
        tokens = sum(len(c.token_ids) for output in outputs for c in output.branches)
        if turn >= 2:  # the first of each warms up
            found[name].append((time.perf_counter() - began) / tokens)
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {"ratio": middle["steered"] / middle["unsteered"], **{f"{n}_seconds_a_token": v for n, v in middle.items()}}


if __name__ == "__main__":
    main()
