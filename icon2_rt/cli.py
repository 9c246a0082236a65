"""The command line: thin commands over the pipeline's functions.

Whatever ends a command and is no bug (bad input, a missing package, a full disk or device) gives one paragraph and exit
code 2; a bug gives a traceback, where to report it, and exit code 1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icon2_rt import failures

if TYPE_CHECKING:
    from icon2_rt.pipeline import RunResult

app = typer.Typer(
    name="icon2",
    help="Steered decoding, and preference pairs from a model's own directions (the Icon² method).",
    epilog="A command that was interrupted continues when it is given again. ICON2_TRACEBACK=1 shows where an error "
    "came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help='A path, a hub id, or "tiny" for the model that ships with the package.')]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Backend = Annotated[str, typer.Option(help="auto, reference, triton or native.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from icon2_rt import __version__

        print(f"icon2_rt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Run folder; by default a new one, runs/demo-1, runs/demo-2 …")
    ] = None,
) -> None:
    """The whole method on the tiny chat model that ships with the package, in less than a minute."""
    from rich.padding import Padding
    from rich.text import Text

    from icon2_rt import demo as the_demo
    from icon2_rt import display
    from icon2_rt.pipeline import run

    screen = display.console()
    screen.print(Text("\nIcon² on the tiny chat model that ships with the package", style="bold"))
    screen.print(
        Padding(
            Text(
                "The model writes its own instructions, finds one direction per criterion from opposite system "
                "prompts, keeps the instructions that agree with a direction, and answers each of them twice in one "
                "pass: pushed towards the direction (chosen) and away from it (rejected)."
            ),
            (0, 0, 0, 2),
        )
    )
    with display.Steps() as watch:
        result = run(the_demo.config(), out or the_demo.fresh_folder(), watch=watch)
    records = list(result.records())
    screen.print(display.run_report(result.report, result.seconds))
    screen.print(display.examples(result.report["examples"][:4]))
    screen.print(display.judgement_table(the_demo.judge(records)))
    _where(screen, result)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The run's settings, a TOML file (see examples/).")],
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/ and the config's name.")] = None,
) -> None:
    """The whole method as a config says. Interrupted, the same command continues it."""
    from icon2_rt import display
    from icon2_rt.pipeline import run as run_pipeline
    from icon2_rt.pipeline.config import RunConfig

    settings = RunConfig.load(config)
    screen = display.console()
    with display.Steps() as watch:
        result = run_pipeline(settings, out or Path("runs") / config.stem, watch=watch)
    screen.print(display.run_report(result.report, result.seconds))
    _where(screen, result)


@app.command()
def calibrate(
    config: Annotated[Path, typer.Argument(help="The run's settings, a TOML file (see examples/).")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder, which `icon2 run` continues; by default runs/ and the name.")
    ] = None,
) -> None:
    """Which strengths suit this model: a ladder of doses, the paper's rule, and how sure it is. Then stop."""
    from icon2_rt import display
    from icon2_rt.pipeline import find_strengths
    from icon2_rt.pipeline.config import RunConfig

    settings = RunConfig.load(config)
    folder = out or Path("runs") / config.stem
    screen = display.console()
    with display.Steps() as watch:
        strengths = find_strengths(settings, folder, watch=watch)
    screen.print(display.strengths_table({"strengths": strengths}))
    screen.print(display.warnings_list(strengths["calibration"]["notes"]))
    screen.print(f"\n  All figures are in {folder / 'strengths.json'}, a picture in {folder / 'calibration.svg'}")
    if settings.calibrates:
        screen.print("  `icon2 run` with the same config and folder goes on from here.")


@app.command()
def directions(
    model: Model,
    criteria: Annotated[Path, typer.Option(help="TOML: a table per criterion with positive and negative prompts.")],
    out: Annotated[Path, typer.Option(help="Where to write them: a .safetensors file.")],
    instructions: Annotated[
        Path | None,
        typer.Option(help="Feature instructions, .txt, .jsonl, .csv …; by default the model writes its own."),
    ] = None,
    features: Annotated[int, typer.Option("-n", "--features", help="How many the model writes.")] = 256,
    method: Annotated[str, typer.Option(help="pca or mean_difference.")] = "pca",
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Step 1 alone: one direction per criterion, from opposite system prompts."""
    from icon2_rt import display
    from icon2_rt.pipeline import single
    from icon2_rt.pipeline.config import RunConfig, read_criteria
    from icon2_rt.pipeline.health import direction_health

    section = _given(method=method, features=features, features_file=_text(instructions))
    settings = RunConfig.from_dict(
        {
            "model": model,
            "seed": seed,
            "runtime": {"device": device, "backend": backend, "dtype": dtype},
            "criteria": {name: vars(criterion) for name, criterion in read_criteria(criteria).items()},
            "directions": section,
        },
        source="icon2 directions",
    )
    _writable(out, (".safetensors",))
    with display.Steps() as watch:
        found = single.directions(settings, watch)
    found.save(out)
    screen = display.console()
    screen.print(display.directions_table(direction_health(found), range(found[found.names[0]].n_layers)))
    screen.print(f"\n  {len(found)} directions in {out}")


@app.command()
def instructions(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write them: a .jsonl file.")],
    count: Annotated[int, typer.Option("-n", "--count", help="How many to draw; hygiene drops some.")] = 100,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus share.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest instruction, in tokens.")] = 256,
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Step 2 without the filter: instructions that the model writes for itself."""
    from icon2_rt import display
    from icon2_rt.atomic import write_atomic
    from icon2_rt.pipeline import single
    from icon2_rt.pipeline.config import RunConfig

    settings = RunConfig.from_dict(
        {
            "model": model,
            "seed": seed,
            "runtime": {"device": device, "backend": backend, "dtype": dtype},
            "instructions": {
                "draws": count,
                "temperature": temperature,
                "top_p": top_p,
                "max_new_tokens": max_new_tokens,
            },
        },
        source="icon2 instructions",
    )
    _writable(out, (".jsonl",))
    with display.Steps() as watch:
        data, counts = single.instructions(settings, watch)
    write_atomic(out, data)
    screen = display.console()
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n and reason not in ("drawn", "clean"))
    screen.print(f"  {counts['clean']} instructions in {out} ({counts['drawn']} drawn; dropped: {dropped or 'none'})")


@app.command()
def pairs(
    model: Model,
    directions: Annotated[Path, typer.Option(help="Directions, .safetensors or .gguf.")],
    instructions: Annotated[
        Path, typer.Option(help="Instructions, .txt, .jsonl, .csv …; a criterion in it is respected.")
    ],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    positive: Annotated[float, typer.Option(help="Strength γ⁺, in residual units.")] = 0.1,
    negative: Annotated[float, typer.Option(help="Strength γ⁻, in residual units.")] = -0.05,
    layers: Annotated[
        str, typer.Option(help='"middle", "all" or 0-based blocks with an exclusive end, "9:20".')
    ] = "middle",
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Nucleus share.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 512,
    noise: Annotated[str, typer.Option(help="independent or common random numbers.")] = "independent",
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Step 3 alone: a steered pair for every instruction, as a dataset. Interrupted, the same command continues."""
    from icon2_rt import display
    from icon2_rt.pipeline import run as run_pipeline
    from icon2_rt.pipeline.config import RunConfig

    settings = RunConfig.from_dict(
        {
            "model": model,
            "seed": seed,
            "runtime": {"device": device, "backend": backend, "dtype": dtype},
            "directions": {"file": str(directions)},
            "instructions": {"file": str(instructions)},
            "filter": {"keep": 1.0},
            "pairs": {
                "positive": positive,
                "negative": negative,
                "layers": layers,
                "temperature": temperature,
                "top_p": top_p,
                "max_new_tokens": max_new_tokens,
                "noise": noise,
            },
        },
        source="icon2 pairs",
    )
    screen = display.console()
    with display.Steps() as watch:
        result = run_pipeline(settings, out, watch=watch)
    screen.print(display.run_report(result.report, result.seconds))
    _where(screen, result)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    out: Annotated[Path, typer.Option(help="Where to write it: a .jsonl or .parquet file.")],
    form: Annotated[
        str, typer.Option("--format", help="dpo; kto (unpaired, labelled); or listwise (a ladder's graded responses).")
    ] = "dpo",
    style: Annotated[
        str, typer.Option(help="conversational (chat messages), or plain (strings, the chat template applied).")
    ] = "conversational",
) -> None:
    """A run's pairs in another trainer's format. The folder itself is TRL's DPO format already."""
    from icon2_rt import display
    from icon2_rt.atomic import write_atomic
    from icon2_rt.pipeline import export as exporting
    from icon2_rt.pipeline.runner import finished_run

    _one_of("--format", form, ("dpo", "kto", "listwise"))
    _one_of("--style", style, ("conversational", "plain"))
    _writable(out, (".jsonl", ".parquet"))
    result = finished_run(folder)
    rows = exporting.of_run(result, form, style)  # type: ignore[arg-type]  # checked above
    write_atomic(out, exporting.to_bytes(rows, out.suffix))
    display.console().print(f"  {len(rows)} rows in {out}, from {result.report['counts']['pairs']} records")


@app.command()
def answers(
    model: Model,
    form: Annotated[str, typer.Option("--format", help="alpaca_eval or arena_hard.")],
    questions: Annotated[Path, typer.Option(help="The benchmark's questions: its .json or .jsonl file.")],
    out: Annotated[Path, typer.Option(help="Where to write them: .json for alpaca_eval, .jsonl for arena_hard.")],
    name: Annotated[
        str | None, typer.Option(help="What the benchmark shall call the model; by default --out's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 2048,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "auto",
) -> None:
    """A model's answers to a benchmark's questions, for the benchmark's own judge. The model may be a trained one."""
    from icon2_rt import display
    from icon2_rt.atomic import write_atomic
    from icon2_rt.pipeline import answers as answering
    from icon2_rt.pipeline.config import RunConfig
    from icon2_rt.pipeline.loading import glance_frame, load_runtime

    _one_of("--format", form, answering.BENCHMARKS)
    _writable(out, (".json" if form == "alpaca_eval" else ".jsonl",))
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("--max-new-tokens must be at least 1, and --temperature at least 0")
    asked = answering.read_questions(questions, form)  # type: ignore[arg-type]  # checked above
    settings = RunConfig.from_dict(
        {"model": model, "seed": seed, "runtime": {"device": device, "backend": backend, "dtype": dtype}},
        source="icon2 answers",
    )
    glance_frame(settings)
    with display.Steps() as watch:
        watch("model", 0, 1)
        rt = load_runtime(settings)
        watch("model", 1, 1)
        records = answering.answer(
            rt,
            asked,
            form,  # type: ignore[arg-type]
            name or out.stem,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            done=lambda n: watch("answers", n, len(asked)),
        )
    write_atomic(out, answering.to_bytes(records, form))  # type: ignore[arg-type]
    display.console().print(f"  {len(records)} answers in {out}")


@app.command("costs")
def show_costs(
    run: Annotated[Path, typer.Argument(help="A finished run of the method.")],
    baselines: Annotated[
        list[Path] | None, typer.Argument(help="Finished runs of baselines on the same model.")
    ] = None,
    unit: Annotated[str, typer.Option(help="flops, tokens or seconds.")] = "flops",
    pairs: Annotated[
        int | None, typer.Option(help="Spread what is done once over so many pairs, not over the run's own.")
    ] = None,
) -> None:
    """What a pair cost, step by step, and what the method saves beside baselines, in three accountings."""
    from icon2_rt import display
    from icon2_rt.pipeline import costs
    from icon2_rt.pipeline.runner import finished_run

    _one_of("--unit", unit, costs.UNITS)
    if pairs is not None and pairs < 1:
        raise ValueError(f"--pairs: must be at least 1, not {pairs}")
    results = [finished_run(path) for path in (run, *(baselines or ()))]
    rows = costs.compare(results[0], results[1:], unit, pairs)  # type: ignore[arg-type]  # checked above
    screen = display.console()
    for result in results:
        screen.print(display.costs_table(result.path.name, result.report["costs"], costs.clock(result.path)))
    screen.print(display.savings_table(rows, unit, costs.ratio(results[0])))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """The benchmarks of a checkout; what follows is passed on to them."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        raise ValueError(
            "the benchmarks are part of the source checkout, not of the installed package: clone the repository and "
            "run `make bench` there"
        )
    finished = subprocess.run([sys.executable, "-m", "bench", *context.args], cwd=root, check=False)
    raise typer.Exit(finished.returncode)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="With --qualify: a path, a hub id or tiny, whose sizes are tried (default: Llama-3-8B's)."),
    ] = None,
    qualify: Annotated[
        bool, typer.Option("--qualify", help="Try the kernels on the GPU, or show what it has proven already.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="With --qualify: try even where a verdict is stored.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """What is installed, what can run here, what would be used and why."""
    from icon2_rt import display
    from icon2_rt.doctor import examine, qualified

    screen = display.console()
    if qualify:
        verdict = qualified(model, device=device, dtype=dtype, again=again)
        screen.print(display.qualification_table(verdict))
        raise typer.Exit(0 if verdict.status == "proven" else 1)
    if model is not None or again:
        raise ValueError("MODEL and --again go with --qualify: icon2 doctor --qualify [MODEL] [--again]")
    findings = examine()
    screen.print(display.findings_table(findings))
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if missing:
        screen.print(f"\n  Missing: {', '.join(missing)}")
        raise typer.Exit(1)


def _where(screen: Any, result: RunResult) -> None:
    """The last lines of a run: what it did because of this model's template, where the dataset lies, how to use it."""
    from rich.padding import Padding
    from rich.text import Text

    path = result.path
    for note in result.manifest["notes"]:
        screen.print(Padding(Text(f"Note: {note}."), (1, 0, 0, 2)))
    screen.print(
        Text(f"\nThe dataset is in {path}  (report.html: all figures; manifest.json: how it was made)", "bold")
    )
    if importlib.util.find_spec("datasets") is None:
        screen.print("  The two lines need `pip install datasets` (training with DPO: `pip install trl`).")
    screen.print(
        Text(
            f"  from datasets import load_dataset\n"
            f"  pairs = load_dataset({json.dumps(str(path), ensure_ascii=False)}, "
            f'split="train")  # prompt, chosen, rejected: TRL\'s DPOTrainer takes it'
        ),
        soft_wrap=True,
    )


def _writable(path: Path, endings: tuple[str, ...]) -> None:
    """Refuse before the work what could not be written after it."""
    if path.suffix not in endings:
        raise ValueError(f"--out: {path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder, not a file")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"--out: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out: the folder {folder} cannot be written")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: must be one of {', '.join(allowed)}, not {value!r}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def main() -> None:
    """The ``icon2`` command."""
    try:
        app(prog_name="icon2")
    except SystemExit as end:
        if end.code == 130:  # typer's word for Ctrl-C
            print("\nstopped; the same command continues a run", file=sys.stderr)
        raise
    except Exception as error:
        if os.environ.get("ICON2_TRACEBACK"):
            raise
        if failures.is_bug(error):
            traceback.print_exception(error)
            print(f"\nicon2: {failures.REPORT}", file=sys.stderr)
            raise SystemExit(1) from None
        print(f"icon2: {failures.paragraph(error)}", file=sys.stderr)
        raise SystemExit(2) from None
