"""bench/RESULTS.md from bench/results/*.json: every figure with the device, versions, commit and load it comes from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import RESULTS, ROOT, targets

# What each figure is held against: so many times the speed of (a); and never slower than (b).
AIMS = {("tiny", 1): 5.0, ("random100m", 1): 2.0, ("random100m", 32): 1.2}
AIMS |= {("llama3-8b", prompts): 8.0 for prompts in (1, 8, 32)}
# What the paper trains on: so many pairs share the directions of a real run.
PAPER_PAIRS = 98_000

HEAD = """# Benchmarks

Made by `python -m bench results` from `bench/results/*.json`; do not edit. `make bench` measures everything on the
machine it runs on and adds its files there. This is what was measured, where and when it says.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench results", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "RESULTS.md")
    options = parser.parse_args(argv)
    stored = [(path.name, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    records = [(name, record) for name, record in stored if record["benchmark"] != "mutants"]  # of the tests, no time
    options.out.write_text(report(records))


def report(records: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The whole document; the same records give the same text."""
    parts = [HEAD, _targets([record for _, record in records])]
    for kind, title, section in SECTIONS:
        mine = [(name, record) for name, record in records if record["benchmark"] == kind]
        if mine:
            parts.append(f"## {title}\n")
        if mine and kind == "proof":
            parts.append(_proof_overview([record for _, record in mine]))
        for name, record in mine:
            parts += [section(record), _where(name, record["environment"])]
    return "\n".join(parts)


def _pairs(record: dict[str, Any]) -> str:
    model, settings = record["model"], record["settings"]
    rows = []
    for f in record["figures"]:
        aim = AIMS.get((model["name"], f["prompts"]))
        rates, speedup, same = f["pairs_per_second"], f["speedup"], f["agreement"]
        rows.append(
            [
                f["prompts"],
                *(_spread(rates[name], 2) for name in ("icon2_rt", "two_calls", "one_call")),
                _spread(speedup["two_calls"], 2, "×"),
                f"{aim:g}×" if aim else "",
                _spread(speedup["one_call"], 2, "×"),
                " / ".join(f"{f['speedup_cpu_time'][name]['median']:.2f}×" for name in ("two_calls", "one_call")),
                " / ".join(f"{100 * same[name]['tokens']:.2f} %" for name in ("two_calls", "one_call")),
                len(f["seconds"]["icon2_rt"]),
                f"{f['load']['before'][0]} to {f['load']['after'][0]}",
            ]
        )
    heads = [
        "prompts",
        "icon2_rt",
        "(a) two calls",
        "(b) one call",
        "over (a)",
        "aim",
        "over (b)",
        "CPU time over (a) / (b)",
        "equal tokens (a) / (b)",
        "rounds",
        "load",
    ]
    text = [
        f"### {_model(model)}\n",
        f"Pairs per second, {settings['new_tokens']} tokens a branch, median (min–max) of the rounds, "
        "in which the contestants take turns in one process. (a) and (b) are transformers with forward hooks: "
        f"{settings['attention']} attention, left padding, one in-place addition per hook. Greedy, no eos token; "
        f"blocks {_span(settings['blocks'])} are steered. Load is that of the last minute: what exceeds the "
        "threads is other work on the machine, which slows clock times down, most of all those of several threads; the "
        "ratio of CPU times suffers less.\n",
        _table(heads, rows),
        "Prompt lengths in tokens: "
        + "; ".join(f"{f['prompts']} prompt(s): {_lengths(f['prompt_lengths'])}" for f in record["figures"])
        + ".",
    ]
    parted = [(f["prompts"], name, a) for f in record["figures"] for name, a in f["agreement"].items() if a["rows"] < 1]
    if parted:
        text.append(
            "\nWhere a row's tokens part, the best next token was ahead of the second by at most "
            + ", ".join(f"{a['largest_lead_where_rows_part']:.1e} ({n} prompts, {name})" for n, name, a in parted)
            + " in logits."
        )
    return "\n".join(text) + "\n"


def _backends(record: dict[str, Any]) -> str:
    rows = []
    for f in record["figures"]:
        reference = f["milliseconds"]["reference"]
        for name, s in f["milliseconds"].items():
            times = [f"{s[k]:.2f}" for k in ("p5", "median", "p95")]
            ratios = [f"{reference[k] / s[k]:.2f}×" for k in ("p5", "median")]
            rows.append([f["prompts"], name, *times, *ratios, f"{100 * f['agreement'][name]:.1f} %", f["load"][0]])
    heads = ["prompts", "backend", "5 %", "median", "95 %", "over reference: 5 %", "median", "equal tokens", "load"]
    return "\n".join(
        [
            f"### {_model(record['model'])}\n",
            "Milliseconds of a decode step (greedy pairs, both branches steered on the middle third of the blocks), "
            f"percentiles over {record['settings']['rounds']} rounds of {record['settings']['new_tokens']} tokens in "
            "which the backends take turns. On a machine that does other things the fifth percentile is nearest to "
            f"what a step takes. Native: {record['settings']['native']}.\n",
            _table(heads, rows),
        ]
    )


def _memory(record: dict[str, Any]) -> str:
    ways, figures = record["settings"]["ways"], record["figures"]
    rows = [
        [f["prompts"], ways[f["way"]], f"{f['before_mib']:.0f}", f"{f['peak_mib']:.0f}", f"{f['run_mib']:.1f}"]
        for f in figures
    ]
    return "\n".join(
        [
            f"### {_model(record['model'])}\n",
            f"Prompts of {figures[0]['prompt_tokens']} tokens, {record['settings']['new_tokens']} new tokens a branch; "
            "each line a fresh process. MiB resident before the run (weights, libraries), at its peak, and the "
            "difference.\n",
            _table(["prompts", "what runs", "before", "peak", "the run itself"], rows),
        ]
    )


def _micro(record: dict[str, Any]) -> str:
    copy = next(f for f in record["figures"] if f["op"] == "device_copy")
    read = next((f for f in record["figures"] if f["op"] == "device_read"), None)
    settings, beside = record["settings"], any("error" in f for f in record["figures"])
    rows = []
    for f in record["figures"]:
        if f is copy or f is read:
            continue
        micros = f["microseconds"]
        row = [
            f["op"], f["model"], f["rows"], f"{micros['median']:.1f}", f"{micros['iqr']:.1f}",
            f"{f['gb_per_second']:.2f}", f"{100 * f['gb_per_second'] / copy['gb_per_second']:.0f} %",
        ]  # fmt: skip
        if beside:
            reference = f.get("reference_microseconds")
            row += [f"{reference:.1f}", f"{f['error']:.1e}"] if reference else ["", ""]
        rows.append(row)
    heads = ["op", "model", "rows", "µs", "IQR", "GB/s", "of the copy", *(["reference µs", "error"] if beside else [])]
    error = (
        " Beside it the reference op on the same device, and ‖out − expected‖ / ‖expected‖ against the reference in "
        "fp32."
        if beside
        else ""
    )
    alone = f"; a read alone, as attention reads KV: {read['gb_per_second']:.1f} GB/s" if read else ""
    return "\n".join(
        [
            f"One call of each {settings['backend']} op in {settings['dtype']}: median and interquartile range in µs, "
            "and the bytes it has to move at least, per second. The device copy of the same run: "
            f"{copy['gb_per_second']:.1f} GB/s (read and written){alone}. More than 100 % means that a cache held the "
            f"arguments.{error}\n",
            _table(heads, rows),
        ]
    )


def _targets(records: Sequence[dict[str, Any]]) -> str:
    lines = targets.table(records)
    if not any(case for _, case, *_ in lines):
        lines = [(name, "–", bound, "–", verdict) for name, _, bound, _, verdict in lines]
    heads = ["target", "case", "bound", "measured", "verdict"]
    return (
        "## What the decode loop is held to on a GPU\n\n"
        "Ratios within one run of `bash bench/gpu.sh OUT`. How they come about, and what is predicted, is in "
        "[docs/performance.md](../docs/performance.md).\n\n" + _table(heads, lines)
    )


def _qualify(record: dict[str, Any]) -> str:
    rows = []
    for f in record["figures"]:
        if not f.get("forms_tried"):
            rows.append([f["model"], "", "", f["status"], f.get("reason", ""), ""])
        for form in f.get("forms_tried", ()):
            chosen = form["form"] in (f["forms"].get(form["op"]), f["prefill"])
            error = "" if form["error"] is None else f"{form['error']:.1e}"
            times = ", ".join(f"{micros:.1f} ({n})" for n, micros in form["microseconds"].items())
            verdict = "used" if chosen else ""
            rows.append([f["model"], form["op"], form["form"], form["wrong"] or "right", error, times, verdict])
    heads = ["model", "op", "form", "verdict", "error", "µs (rows)", ""]
    told = "; ".join(f"{f['model']}: {f['status']}, {f.get('reason', '')}" for f in record["figures"])
    return f'What a device has proven, and so what `backend="auto"` uses there. {told}.\n\n' + _table(
        heads, [[*row, *[""] * (len(heads) - len(row))] for row in rows]
    )


def _step(record: dict[str, Any]) -> str:
    rows = []
    for f in record["figures"]:
        cell = [f["model"], f["pairs"], f["prompt"]]
        if f["status"] != "measured":
            rows.append([*cell, f["status"], "", "", "", ""])
            continue
        ms, predicted = f["milliseconds"], f["predicted_milliseconds"]
        speed = [f"{f['gb_per_second']:.0f}", f"{100 * f['of_copy']:.0f} %"]
        rows.append([*cell, _spread(ms, 3), f"{predicted:.3f}", f"{ms['median'] / predicted:.2f}×", *speed])
    heads = ["model", "pairs", "prompt", "ms", "predicted", "over predicted", "GB/s", "of the copy"]
    return (
        "Median (min–max) of one decode step of steered pairs (all blocks, random bf16 weights, KV of random numbers), "
        "what the roofline predicts with this device's copy "
        f"({record['copy']['gb_per_second']:.0f} GB/s, read and written), and the bytes that a step has to move at "
        "least, per second.\n\n" + _table(heads, rows)
    )


def _overhead(record: dict[str, Any]) -> str:
    rows = []
    for f in record["figures"]:
        cell = [f["model"], f["name"], f["rows"], f["prompt"]]
        predicted = f"{f['predicted_ratio']:.3f}" if "predicted_ratio" in f else ""
        if f["status"] != "measured":
            rows.append([*cell, f["status"], predicted, "", ""])
            continue
        ms = f["milliseconds"]
        rows.append(
            [*cell, _spread(f["ratio"], 4), predicted, f"{ms['over']['median']:.3f}", f"{ms['under']['median']:.3f}"]
        )
    heads = ["model", "what over what", "rows", "prompt", "ratio", "predicted", "ms over", "ms under"]
    return (
        "Two seatings of one engine in turns: median (min–max) of the rounds' ratios, and both sides' median step.\n\n"
        + _table(heads, rows)
    )


def _crossover(record: dict[str, Any]) -> str:
    settings, parts = record["settings"], []
    cells = record["figures"]
    branches = sorted({f["branches"] for f in cells})
    for what, title in (("attention", "attention alone, one block"), ("step", "a whole decode step")):
        sets = dict.fromkeys((f["model"], f["backend"]) for f in cells if f["what"] == what)
        rows = []
        for model, backend in sets:
            mine = [f for f in cells if (f["what"], f["model"], f["backend"]) == (what, model, backend)]
            for prefix in sorted({f["prefix"] for f in mine}):
                by_branches = {f["branches"]: f for f in mine if f["prefix"] == prefix}
                rows.append([f"{model}, {backend}", prefix, *(_crossing(by_branches.get(k)) for k in branches)])
        if rows:
            heads = ["", "prefix", *(f"{k} branches" for k in branches)]
            parts.append(f"### {title.capitalize()}\n\n" + _table(heads, rows))
    parts.append(_crossover_memory(cells, branches))
    slower = [f for f in cells if f.get("verdict") == "slower"]
    told = "; ".join(f"{f['model']}, {f['backend']}, {f['branches']} × {f['prefix']} ({f['what']})" for f in slower)
    counted = sum(f["status"] == "measured" for f in cells)
    earlier = sum("earlier" in f for f in cells)
    return (
        "A group's branches reading their prompt's KV together, and the same branches reading it alone, in turns: how "
        "many times as long the latter takes, the median of neighbouring turns and, in brackets, where it lies with a "
        f"confidence of 99 %. Time: {settings['clock']}. With a prefix below one split ({settings['split']} positions) "
        "nothing can be shared and both sides are the same: the noise of the machine. A dash "
        "was not reached in the time.\n\n"
        + "\n".join(parts)
        + f"\nSlower together beyond noise: {told or 'nowhere'}, of {counted} cells"
        + (f"; {earlier} of them measured again with more turns, the first time is in the file" if earlier else "")
        + ".\n"
    )


def _crossing(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    if figure["status"] != "measured":
        return "–" if figure["status"].startswith("not reached") else str(figure["status"])
    r = figure["ratio"]
    return f"{r['median']:.2f}× ({r['low']:.2f}–{r['high']:.2f})"


def _crossover_memory(cells: Sequence[dict[str, Any]], branches: Sequence[int]) -> str:
    """KV memory with one copy of the prompt and with one a branch: the same for all that have a model's sizes."""
    rows = []
    for model in dict.fromkeys(f["model"] for f in cells):
        mine = {(f["prefix"], f["branches"]): f["kv_mib"] for f in cells if f["model"] == model}
        for prefix in sorted({prefix for prefix, _ in mine}):
            found = [mine.get((prefix, k)) for k in branches]
            shown = [f"{m['shared']:.0f} / {m['unshared']:.0f}" if m else "" for m in found]
            rows.append([model, prefix, *shown])
    heads = ["", "prefix", *(f"{k} branches" for k in branches)]
    return "### KV memory in MiB, one copy of the prompt / a copy a branch\n\n" + _table(heads, rows)


def _proof(record: dict[str, Any]) -> str:
    s, made = record["settings"], record["model"]
    parts = {
        "directions": _proof_directions,
        "criterion": _proof_criterion,
        "sweep": _proof_sweep,
        "held_out": _proof_held_out,
    }
    return "\n".join(
        [
            f"### {made['name']} (corpus {made['corpus']}, {made['steps']} steps)\n",
            *(line for name, part in parts.items() if name in record for line in part(record[name], s)),
            f"Seconds: {', '.join(f'{name} {value:g}' for name, value in record['seconds'].items())}.\n",
        ]
    )


def _proof_overview(records: Sequence[dict[str, Any]]) -> str:
    """c* over all models: the confusion tables side by side."""
    records = sorted(records, key=lambda record: (record["model"]["corpus"] != "shipped", record["model"]["name"]))
    models = [record["model"] for record in records]
    tables = [record["criterion"]["tables"] for record in records]
    rows = []
    for scale, table in tables[0].items():
        rows.append([scale, "all", *(f"**{t[scale]['right']:.0%}**" for t in tables)])
        rows.extend(
            ["", kind, *(" / ".join(map(str, t[scale]["confusion"][kind].values())) for t in tables)]
            for kind in table["confusion"]
        )
    rows.append(["lowest z-score", "all", *(f"{r['criterion']['right_if_lowest_zscore']:.0%}" for r in records)])
    names = " / ".join(next(iter(tables[0]["raw"]["confusion"].values())))
    return (
        "### c\\* on every model\n\n"
        f"How often c\\* is the criterion that the instruction is about, and how often it is {names} for each kind of "
        "instruction (questions are about honesty, tasks about helpfulness, misdeeds about harmlessness); chance is "
        "33 %. seed0 is the shipped model; the other seeds differ in nothing else. wordings was trained on a corpus in "
        "which every prompt has some fifty wordings and the ones that the method uses never occur; mostly_good is the "
        "shipped model trained on for 1200 steps with good responses in 84 % of the documents that no prompt settles, "
        "in place of 46 %.\n\n" + _table(["scale", "kind", *(model["name"] for model in models)], rows)
    )


def _proof_directions(bands: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    rows = [
        [band, name, *(f"{f[k]:.4f}" for k in ("split_half_cosine", "cos_mean_difference")),
         f"{f['sign_agreement']:.1%}", f"{f['contrast']:.0%}"]
        for band, criteria in bands.items()
        for name, f in criteria.items()
    ]  # fmt: skip
    heads = ["blocks", "criterion", "split-half cosine", "cos(PC1, mean)", "sign agreement", "largest ‖Δ‖/‖h‖"]
    text = (
        f"**1. Directions** from {settings['features']} instructions of the model's own; the worst block of the band."
    )
    return [f"{text}\n", _table(heads, rows)]


def _proof_criterion(found: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    tables, between = found["tables"], found["between_the_prompts"]
    names = list(next(iter(between.values())))
    rows = [
        [scale if i == 0 else "", f"{table['right']:.0%}" if i == 0 else "", kind, *(counts[name] for name in names)]
        for scale, table in tables.items()
        for i, (kind, counts) in enumerate(table["confusion"].items())
    ]
    lies = [
        [
            kind,
            *(
                f"{row[n]['span']:.1f} / {row[n]['place']:.2f} / {row[n]['place_among_its_own']:.2f} / "
                f"{row[n]['zscore']:+.2f}"
                for n in names
            ),
        ]
        for kind, row in between.items()
    ]
    return [
        f"**2. c\\*** of {found['instructions']} instructions whose kind the oracle knows (questions are about "
        "honesty, tasks about helpfulness, misdeeds about harmlessness); chance is 33 %.\n",
        _table(["scale", "right", "kind", *(f"c\\* {name}" for name in names)], rows),
        "Where an instruction lies without a system prompt, per criterion: the distance between its two system prompts "
        "along the direction (mean over blocks) / its place on that way (0: as under the negative prompt, 1: as under "
        "the positive one) / its place on the way of the instructions that the criterion is about / its mean z-score. "
        f"Taking the *lowest* z-score would be right in "
        f"{found['right_if_lowest_zscore']:.0%}.\n",
        _table(["kind", *names], lies),
    ]


def _proof_sweep(bands: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    rows = []
    for i, rung in enumerate(next(iter(bands.values()))["rungs"]):
        row: list[object] = [f"{rung['dose']:+.0%}"]
        for band in bands.values():
            r = band["rungs"][i]
            a = r["against"]
            wins = (
                "" if a is None or a["better"] is None else f"{a['better']:.0%} of {a['differ']}, ties {a['ties']:.0%}"
            )
            row += [f"{r['score']:.3f}", f"{r['well_formed']:.0%}", wins]
        rows.append(row)
    heads = ["dose", *(h for band in bands for h in (f"score, {band}", "well formed", "+15 % better"))]
    return [
        f"**3. The sweep**: the oracle's mean score of {settings['sweep']} instructions at every dose (a broken text "
        "is 0; temperature 0.8, common random numbers), and how often the response at +15 % is better among the pairs "
        "that are well formed on both sides and differ.\n",
        _table(heads, rows),
    ]


def _proof_held_out(ways: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    rows = []
    for way, f in ways.items():
        o, scores = f["oracle"], f["scores"]
        low, high = o["better_interval"] or (float("nan"), float("nan"))
        better = "–" if o["better"] is None else f"{o['better']:.1%} ({low:.0%} to {high:.0%})"
        rows.append(
            [
                way,
                f["band"],
                f"{f['positive_dose']:+.0%} / {f['negative_dose']:+.0%}",
                f"{f['agreement']['better']:.0%}",
                f"{o['both_well_formed']:.1%}",
                f"{o['ties']:.0%}",
                f"{f['identical']:.0%}",
                better,
                f"{scores['chosen']:.2f} / {scores['unsteered']:.2f} / {scores['rejected']:.2f}",
            ]
        )
    heads = [
        "sampling", "band", "doses", "agreement says", "both well formed", "ties", "identical", "P(chosen better)",
        "score chosen / unsteered / rejected",
    ]  # fmt: skip
    return [
        f"**4. Strengths chosen on {settings['chosen']} instructions** by agreement, which asks nobody, with a bound "
        f"of {settings['max_divergence']} nats per token on the divergence, **and reported on {settings['reported']} "
        "others** by the oracle. Ties are among the pairs that are well formed on both sides, P(chosen better) among "
        "those of them that differ (95 % interval).\n",
        _table(heads, rows),
    ]


def _training(record: dict[str, Any]) -> str:
    """Proof items 5 and 6: what DPO makes of each dataset, and what a pair cost."""
    settings, before, trained = record["settings"], record["untrained"], record["trained"]
    training, pairs = settings["training"], trained["icon2"]["datasets"][0]["pairs"]
    kinds = sorted(before["kinds"])
    rows = [
        [
            "before training", "", "", "", "", f"{before['score']:.3f}", "", "",
            " / ".join(f"{before['kinds'][kind]:.2f}" for kind in kinds), f"{before['well_formed']:.1%}",
        ]
    ]  # fmt: skip
    curves: list[list[object]] = []
    for name, found in trained.items():
        made = found["datasets"]
        seeds = [seed for dataset in made for seed in dataset["seeds"]]
        rows.append(
            [
                name,
                " ".join(str(dataset["pairs"]) for dataset in made),
                f"{fmean(dataset['oracle']['both_well_formed'] for dataset in made):.1%}",
                f"{fmean(dataset['oracle']['chosen_better'] for dataset in made):.1%}",
                " / ".join(f"{fmean(dataset['oracle'][s] for dataset in made):.2f}" for s in ("chosen", "rejected")),
                f"{found['mean']:.3f}",
                _deviation(found["spread_over_trainings"]),
                _deviation(found["spread_over_datasets"]),
                " / ".join(f"{fmean(seed['kinds'][kind] for seed in seeds):.2f}" for kind in kinds),
                f"{fmean(seed['well_formed'] for seed in seeds):.1%}",
            ]
        )
        # Datasets differ in size, and so runs in length: a mean needs every run.
        points = zip(*(seed["reward_accuracy"] for seed in seeds), strict=False)
        curves.append([name, *(f"{fmean(accuracy for _, accuracy in point):.2f}" for point in points)])
    heads = [
        "dataset", "pairs", "both well formed", "chosen better where they differ", "score chosen / rejected",
        "score after DPO",
        "± over trainings", "± over datasets", " / ".join(kinds), "well formed after",
    ]  # fmt: skip
    text = (
        f"### {record['model']['name']}\n\n"
        f"**5. Training.** DPO with TRL (β {training['beta']}, learning rate {training['learning_rate']:g}, batches of "
        f"{training['batch']}, {training['epochs']} epochs) on pairs for the same instructions: {settings['datasets']} "
        f"datasets of each recipe, {settings['seeds']} trainings on each. The oracle's mean score of unsteered answers "
        f"to {settings['asked']} instructions of the world, temperature 0.8, broken ones 0, and by kind; the spread is "
        "the standard deviation over the seeds of the training on one dataset, and over the datasets' means. "
        f"best_of_n asks the oracle itself.\n\n" + _table(heads, rows)
    )
    width = max(len(curve) for curve in curves) - 1
    seed = max((seed for found in trained.values() for d in found["datasets"] for seed in d["seeds"]), key=_points)
    steps = [step for step, _ in seed["reward_accuracy"]][:width]
    text += "\nThe reward accuracy by step, the mean over datasets and trainings:\n\n"
    text += _table(["dataset", *map(str, steps)], [curve + [""] * (width + 1 - len(curve)) for curve in curves])
    chosen = {
        name: ", ".join(f"{s['band']} {s['positive_dose']:+.0%} / {s['negative_dose']:+.0%}" for s in strengths)
        for name, strengths in record["strengths"].items()
    }
    text += "\nThe calibration's choice for each dataset: "
    text += "; ".join(f"{name} {choice}" for name, choice in chosen.items()) + ".\n"
    return (
        text
        + _bills(record["costs"], pairs)
        + (
            f"\nAn instruction has {record['ratio']:.2f} times the tokens of a response here, about a third in the "
            "paper's data; icon2's filter keeps one of two and reads each under every criterion's two prompts (scale "
            "contrast).\n"
        )
    )


def _points(seed: dict[str, Any]) -> int:
    return len(seed["reward_accuracy"])


def _deviation(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _seconds(record: dict[str, Any]) -> str:
    return (
        f"### {record['model']['name']}\n"
        + _bills(record["costs"], record["settings"]["pairs"])
        + (
            f"\nA steered token took {record['steered_over_unsteered']['ratio']:.2f} times as long as an unsteered one "
            f"(medians of {record['settings']['turns']} turns).\n"
        )
    )


def _bills(costs: dict[str, Any], pairs: int) -> str:
    """Proof item 6: a table for each unit."""
    names = {"all": "D_raw to all", "own": "own needs", "paper": "the paper's"}
    text = ""
    for unit, bills in costs.items():
        spread = pairs / PAPER_PAIRS
        totals = [{a: bill["total"][a] - (1 - spread) * bill["once"] for a in names} for bill in bills]
        rows = [
            [
                bill["name"],
                *(f"{bill[key]:.3g}" for key in ("answering", "judging")),
                f"{spread * bill['once']:.3g}",
                *(f"{total[a]:.3g}" + (f" ({1 - totals[0][a] / total[a]:+.0%})" if n else "") for a in names),
            ]
            for n, (bill, total) in enumerate(zip(bills, totals, strict=True))
        ]
        text += (
            f"\n**6. A pair's cost in {unit}**; in brackets what icon2 saves beside it. What is done once is spread "
            f"over the paper's {PAPER_PAIRS} pairs, not over these {pairs}.\n\n"
        )
        text += _table(["", "answers", "judging or scoring", "directions, strengths", *names.values()], rows)
    return text


def _host(record: dict[str, Any]) -> str:
    """One table, a column for each version of the code in the file."""
    runs = record["runs"]
    names = sorted(runs, key=lambda name: runs[name]["environment"]["date"])
    rows: dict[str, list[str]] = {}

    def add(what: str, value: str) -> None:
        rows.setdefault(what, []).append(value)

    for name in names:
        f = runs[name]["figures"]
        for s in f["seating"]:
            add(f"copies up to seat {s['pairs']} pair(s) of {s['prompt']} tokens", f"{s['count'].get('up', 0)}")
        mean, layout = f["steps"]["mean"], f["steps"]["layout"]["count"]
        many = f"{f['steps']['steps']} steps of {f['steps']['pairs']} pairs"
        add(f"copies up / down a step, mean of {many}", f"{mean.get('up', 0):.2f} / {mean.get('down', 0):.2f}")
        add("copies up in a step that lays out anew", f"{layout.get('up', 0)}")
        for p in f["prefill"]:
            counts = ", ".join(f"{n} {kind}" for kind, n in sorted(p["count"].items())) or "0"
            add(f"copies of a prefill pass, {p['prompts']} prompt(s), scope {p['scope']}", counts)
        for x in f["layout"]:
            where = f"{x['pairs']} pairs × {x['prompt']} tokens"
            for kind, text in (("steady", "the same rows"), ("joined", "a pair has joined")):
                add(f"ms of a layout, {where}, {text}", _spread(x["milliseconds"][kind], 2))
            add(f"calls of a layout, {where}", f"{x['calls']}")
        step = f["step"]
        add(f"µs of the host for a step of {step['rows']} rows", _spread(step["microseconds"], 0))
        add(f"calls for a step of {step['rows']} rows", f"{step['calls']:.0f}")
        for a in f["admission"]:
            add(
                f"prefill passes / pairs a pass / steps, {a['pairs']} pairs of mixed lengths, {a['seats']} seats",
                f"{a['passes']} / {a['pairs_per_pass']:.1f} / {a['steps']}",
            )
    commits = ", ".join(f"{name}: {(runs[name]['environment']['commit'] or 'unknown')[:12]}" for name in names)
    return (
        "Steps and prefill are stubs, so that what is left is the host's work; the sizes are Llama-3-8B's. A copy that "
        "is *blocking* waits for the device. Calls are the functions that the interpreter calls, Python's and C's: the "
        "same in every run, while the times of the thread (median, least to most) grow with other work on the machine. "
        f"Commits: {commits}.\n\n" + _table(["", *names], [[what, *values] for what, values in rows.items()])
    )


SECTIONS = (
    ("proof", "The method, where the truth is known", _proof),
    ("training", "Training on the pairs, and what they cost", _training),
    ("seconds", "What a pair takes", _seconds),
    ("qualify", "What the kernels have proven on a device", _qualify),
    ("step", "A decode step", _step),
    ("overhead", "What steering, branches and sharing cost", _overhead),
    ("crossover", "Where sharing the prompt's KV pays", _crossover),
    ("backends", "The backends of a CPU beside each other", _backends),
    ("pairs", "Pairs per second, end to end", _pairs),
    ("memory", "Peak memory of a pair beside two single runs", _memory),
    ("host", "What the host does", _host),
    ("micro", "The ops one by one", _micro),
)


def _where(name: str, e: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in e["versions"].items())
    changed = f", with {len(e['changed_files'])} changed file(s)" if e["changed_files"] else ""
    gpu = e.get("gpu")
    on = (
        f"{gpu['name']} ({gpu['capability']}, {gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']} GiB, CUDA "
        f"{gpu['cuda']}, driver {gpu['driver']}), host "
        if gpu
        else ""
    )
    return (
        f"<sub>`{name}`: {on}{e['device']}, {e['threads']} threads on {e['cores']} cores ({e['instructions']}); "
        f"Python {e['python']}, {versions}; commit {(e['commit'] or 'unknown')[:12]}{changed}; {e['date']}; "
        f"load {' '.join(map(str, e['load']))}.</sub>\n"
    )


def _model(model: dict[str, Any]) -> str:
    names = {"tiny": "The model that ships with the package", "random100m": "A random Llama"}
    name = names.get(model["name"], f"{model['name']}, random")
    return (
        f"{name}: {model['parameters'] / 1e6:.1f}M parameters, {model['num_hidden_layers']} blocks × "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']}, {model['dtype']}"
    )


def _spread(s: dict[str, float], digits: int, unit: str = "") -> str:
    return f"{s['median']:.{digits}f}{unit} ({s['min']:.{digits}f}–{s['max']:.{digits}f})"


def _span(blocks: Sequence[int]) -> str:
    return f"{blocks[0]} to {blocks[-1]}"


def _lengths(lengths: Sequence[int]) -> str:
    """The list, or its repeating part."""
    for period in range(1, len(lengths)):
        if len(lengths) % period == 0 and list(lengths) == list(lengths[:period]) * (len(lengths) // period):
            return f"{len(lengths) // period} times ({', '.join(map(str, lengths[:period]))})"
    return ", ".join(map(str, lengths))


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
