"""The report's page: whole, harmless whatever a model wrote, and drawn without an error in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from icon2_rt.pipeline import charts, checks, health, page
from icon2_rt.pipeline.charts import Axis, Series

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
VOID = {"meta", "br", "img", "link", "input", "hr"}


def _band(name: str, layers: list[int]) -> dict[str, Any]:
    rungs = [
        {
            "dose": dose,
            "quality": dose,
            "quality_interval": [dose - 0.1, dose + 0.1],
            "logprob": -1 - dose**2,
            "fluent": dose < 0.2,
        }
        for dose in (-0.2, -0.1, 0.0, 0.1, 0.2)
    ]
    return {"band": name, "layers": layers, "rungs": rungs, "positive_dose": 0.2, "negative_dose": -0.1}


def _report(name: str = "kind") -> dict[str, Any]:
    """A report with every section, small and made up; ``name`` is the first criterion's."""
    names, sides = [name, "brief"], ("chosen", "rejected")
    figures = ("contrast", "cos_mean_difference", "sign_agreement", "split_half_cosine")
    values = {side: [0.1 * i - 0.3 * (side == "rejected") for i in range(9)] for side in (*sides, "neutral")}
    report: dict[str, Any] = {
        "counts": {"instructions": {"drawn": 20, "empty": 2, "clean": 18, "kept": 9}, "pairs": 9},
        "directions": {
            "names": names,
            "health": {n: {figure: [0.1, 0.5, 0.9, 0.99] for figure in figures} for n in names},
            "cosines": [[1.0, -0.25], [-0.25, 1.0]],
        },
        "consistency": {
            "scale": "raw",
            "kept_share": 0.5,
            "histogram": {name: 12, "brief": 6},
            "kept_histogram": {name: 6, "brief": 3},
            "distributions": {
                "score": health.histograms({"clean": [1.0, 2.0, 3.0], "kept": [3.0]}),
                "by_criterion": health.histograms({name: [1.0, 2.0], "brief": [0.5]}),
            },
            "warnings": [],
        },
        "strengths": {
            "positive": {name: 4.0, "brief": 3.0},
            "negative": {name: -2.0, "brief": -1.0},
            "layers": [1, 2],
            "residual_norms": [10.0, 20.0, 30.0, 40.0],
            "dose": {"positive": [None, 0.2, 0.13, None], "negative": [None, 0.1, 0.07, None]},
            "calibration": {
                "quality": "agreement",
                "band": "middle",
                "bands": [_band("middle", [1, 2]), _band("all", [0, 1, 2, 3])],
                "positive_beats_negative": 0.92,
                "positive_beats_negative_interval": [0.85, 0.97],
                "positive_beats_negative_held_out": 0.9,
                "ties": 0.1,
                "notes": [],
            },
        },
        "pairs": {
            "pairs": 9,
            "per_criterion": {name: 6, "brief": 3},
            "identical": 0.0,
            "median_first_difference": 3,
            "length_ratio": 1.1,
            "chosen_longer": 0.5,
            "same_draws": False,
            **{
                side: {"mean_tokens": 9.0, "logprob_per_token": -1.0, "cut_off": 0.2, "empty": 0.0, "repetition": 0.0}
                for side in sides
            },
            "distributions": {
                "tokens": health.histograms({side: [3, 5, 9] for side in sides}),
                "logprob_per_token": health.histograms({side: [-1.0, -2.0, -1.5] for side in sides}),
                "first_difference": health.histograms({"pairs": [0, 1, 1]}),
            },
        },
        "costs": {
            "pairs": 9,
            "steps": {
                "synthesis": {"prefilled": 100, "decoded": 2000, "scored": 0, "flops": 10**9},
                "pairs": {"prefilled": 100, "decoded": 4000, "scored": 0, "flops": 3 * 10**9},
            },
            "judge": {"tokens": 700, "flops": 10**8},
        },
        "separability": {"pairs": 9, "curve": [[8, 0.5], [16, 0.98]], "accuracy": 0.98, "separated_after": 16},
        "effect": {
            "pairs": 9,
            "projection": {
                "per_block": {side: [0.0, 0.1, 0.2, 0.3] for side in (*sides, "neutral")},
                "controlled": values,
                "chosen_higher": 1.0,
            },
            "agreement": {**values, "chosen_higher": 1.0},
            "logprob_per_token": dict.fromkeys((*sides, "neutral"), -1.0),
            "loss": {"chosen": 0.0, "rejected": 0.2},
        },
        "examples": [
            {"criterion": name, "prompt": "Why? " + name, "chosen": "I think so.", "rejected": "I thought not."},
            {"criterion": "brief", "prompt": "مرحبا", "chosen": "one\ntwo", "rejected": ""},
        ],
    }
    found = checks.examine(report)
    return {"checks": [check.to_dict() for check in found], "warnings": checks.warnings(found), **report}


def _manifest(name: str = "kind") -> dict[str, Any]:
    return {
        "identity": {"config": {"model": f"models/{name}"}, "versions": {"torch": "2.13.0"}},
        "criteria": {name: {"positive": "Be kind.", "negative": "Be cruel."}},
        "sampling": {"pairs": {"temperature": 0.8}},
        "seeds": {"run": 0},
        "notes": ["the template has no system turn"],
    }


class _Reader(HTMLParser):
    """Tags in order, with whether each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_the_page_is_whole() -> None:
    reader = _Reader(page.render(_report(), _manifest()))
    assert reader.open == []
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert max(Counter(ids).values()) == 1
    assert links == [f"#{name}" for name in ids]
    counted = Counter(tag for tag, _ in reader.tags)
    assert counted["svg"] == counted["figure"] == 17
    assert counted["details"] == len(_report()["checks"]) + 1  # and the settings
    text = " ".join(" ".join(reader.text).split())
    for check in _report()["checks"]:
        assert check["title"] in text
        assert check["todo"] in text
    for words in (
        "models/kind",
        "Be cruel.",
        "no system turn",
        "98 %",
        "444 M forward FLOPs",
        "9 instructions kept of 20 drawn",
        "✕ 4 red",
    ):
        assert words in text


def test_costs_have_seconds_and_memory_where_they_were_measured() -> None:
    clock = {"pairs": {"seconds": 90.0, "peak_bytes": 3 * 2**20}, "judging": {"seconds": 4.5, "peak_bytes": 0}}
    text = " ".join(" ".join(_Reader(page.render(_report(), _manifest(), clock)).text).split())
    costs = text[text.index("A pair took") : text.index("In tokens.")]
    assert "10.5 s" in costs  # 94.5 s over 9 pairs
    assert "synthesis 100 2,000 0 1 G 25.0% – – " in costs
    assert "pairs 100 4,000 0 3 G 75.0% 90 3 judging 0 0 0 0 0.0% 4.5 – all 200 6,000 0 4 G 100% 94.5 3 " in costs
    assert " s, without" not in page.render(_report(), _manifest())


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    text = page.render(_report(), _manifest())
    reader = _Reader(text)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "img", "link", "iframe", "object", "embed"})
    assert not re.search(r"https?:|url\(|@import", text)
    assert not any(name.startswith("on") or name == "src" for _, attributes in reader.tags for name in attributes)
    policy = [
        a["content"] for tag, a in reader.tags if tag == "meta" and "content" in a and "default-src" in a["content"]
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_what_a_model_wrote_is_only_text() -> None:
    """Names of criteria and models, prompts, responses, notes: none of them can break out."""
    report, manifest = _report(EVIL), _manifest(EVIL)
    report["examples"][0] |= {"chosen": EVIL, "rejected": EVIL + "b"}
    report["warnings"] = [EVIL]
    reader = _Reader(page.render(report, manifest))
    assert {"script", "img"}.isdisjoint(tag for tag, _ in reader.tags)
    assert "".join(reader.text).count(EVIL) >= 8


def test_sections_without_figures_are_left_out() -> None:
    """A dataset that was made without steering has pairs and nothing else."""
    whole = _report()
    pairs = {key: whole[key] for key in ("pairs", "separability", "examples")}
    pairs["examples"] = [{**pairs["examples"][0], "criterion": None}]
    report = {**pairs, "counts": {"pairs": 9}}
    found = checks.examine(report)
    report |= {"checks": [check.to_dict() for check in found], "warnings": []}
    reader = _Reader(page.render(report, {"identity": {"config": {"model": "m"}}}))
    assert [a["id"] for _, a in reader.tags if "id" in a] == ["checks", "pairs", "examples", "making"]


@pytest.mark.parametrize(
    ("a", "b", "same", "words"),
    [
        ("I think so.", "I thought not.", "I ", ("think", "thought")),
        ("one two", "one", "", ("one", "one")),
        ("one two", "one ", "one ", ("two", "")),
        ("same", "same", "same", ("", "")),
        ("", "text here", "", ("", "text")),
        ("a\n\nb", "a\n\nc", "a\n\n", ("b", "c")),
    ],
)
def test_where_two_texts_part(a: str, b: str, same: str, words: tuple[str, str]) -> None:
    shared = page._parting(a, b)
    assert a[:shared] == b[:shared] == same
    for text, word in zip((a, b), words, strict=True):
        marked = page._marked(text, shared)
        assert re.findall("<mark>(.*?)</mark>", marked, re.DOTALL) == ([word] if word else [])
        assert html.unescape(re.sub("<[^>]*>", "", marked)) == text


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_can_be_read_in_both_themes() -> None:
    """The contrast that WCAG asks for: 4.5 for words, 3 for lines."""
    css = (Path(page.__file__).parent / "charts.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([\w]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert len(themes) == 2
    for theme in themes:
        for name, colour in theme.items():
            if name in ("bg", "card", "line", "mark"):
                continue
            for ground in ("bg", "card"):
                high, low = sorted((_luminance(colour), _luminance(theme[ground])), reverse=True)
                words = name in ("fg", "dim", "link", "green", "yellow", "red")
                assert (high + 0.05) / (low + 0.05) >= (4.5 if words else 3), (name, ground)
        high, low = sorted((_luminance(theme["fg"]), _luminance(theme["mark"])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.37, 12.4), (1e-6, 3e-6), (5, 5), (0, 0), (-3e7, 8e8), (0.979, 0.9998)]
)
def test_ticks_are_few_even_and_reach_over_everything(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 9
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]  # noqa: RUF007
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"


def test_an_axis_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        charts.ticks(0.0, float("nan"))


def _numbers(svg: str) -> list[tuple[float, float]]:
    drawn = re.findall(r' d="([^"]+)"', svg)
    return [(float(x), float(y)) for path in drawn for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


def test_lines_stay_on_the_paper_and_leave_gaps() -> None:
    points = [(0.0, 1.0), (1.0, 5.0), (2.0, None), (3.0, -2.0), (4.0, 0.5), (5.0, None), (6.0, 2.0)]
    svg = charts.lines([Series("a", points, "s0")], Axis("x"), Axis("y"), band=(1, 3), marks=(9.0,))
    assert svg.count("<path") == 2  # two runs of more than one point; the last point stands alone
    assert svg.count("<circle") == 5
    for x, y in _numbers(svg):
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM
    heights = [y for _, y in _numbers(svg)]
    assert heights[1] < heights[0] < heights[3] < heights[2]  # the page's y grows downwards


def test_a_doubling_axis_has_even_steps() -> None:
    svg = charts.lines([Series("a", [(8, 1.0), (16, 1.0), (32, 1.0)], "s0")], Axis("n", log=True), Axis("y"))
    xs = [x for x, _ in _numbers(svg)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_histograms_show_shares_of_each() -> None:
    svg = charts.histogram(
        [0.0, 1.0, 2.0], {"a": ("s0", [1, 1]), "b": ("s1", [30, 10]), "none": ("s2", [0, 0])}, Axis("x")
    )
    assert svg.count('<path class="area') == 3
    tops = {
        name: min(float(y) for y in re.findall(r",(-?[\d.]+)", path))
        for name, path in re.findall(r'class="area (\w+)" d="([^"]+)"', svg)
    }
    assert tops["s1"] < tops["s0"] < tops["s2"] == charts.HEIGHT - charts.BOTTOM


# --- a real browser --------------------------------------------------------------------------------------------------


def _browse(target: Path, profile: Path) -> tuple[str, str]:
    """The page's DOM after everything has run, and what the browser said."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
        "--virtual-time-budget=5000", f"--user-data-dir={profile}", "--dump-dom",
    ]  # fmt: skip
    command = [str(BROWSER), *options, target.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env={**os.environ})
    return done.stdout, done.stderr


@pytest.mark.skipif(BROWSER is None, reason=f"no browser to look with: none of {', '.join(BROWSERS)} is installed")
def test_a_browser_draws_it_without_an_error_at_every_width(tmp_path: Path) -> None:
    """On a phone, a tablet and a desktop: nothing is wider than the screen, every chart has a size, no word in the
    console. An error of the page's own would be seen: a page with one is."""
    text = page.render(_report("x" * 60), _manifest())
    frames = "".join(
        f'<iframe width="{w}" height="800" srcdoc="{html.escape(text)}"></iframe>' for w in (320, 390, 768, 1280)
    )
    measure = """
    addEventListener("load", () => {
      const found = [...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument;
        const charts = [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
        for (const d of page.querySelectorAll("details")) d.open = true;
        return [frame.clientWidth, page.documentElement.scrollWidth, charts.length,
                Math.min(...charts.map(c => c.width)), getComputedStyle(page.body).fontSize];
      });
      document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
    });"""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><body>{frames}<script>{measure}</script></body>", encoding="utf-8")
    dom, said = _browse(wrapper, tmp_path / "a")
    assert "CONSOLE" not in said
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom).group(1)))  # type: ignore[union-attr]
    assert [row[0] for row in found] == [320, 390, 768, 1280]
    for width, scroll, drawn, smallest, letters in found:
        assert scroll <= width
        assert drawn == 17
        assert smallest >= 250
        assert letters == "16px"

    alone = tmp_path / "report.html"
    alone.write_text(text, encoding="utf-8")
    dom, said = _browse(alone, tmp_path / "b")
    assert "CONSOLE" not in said
    assert dom.count("<svg") == 17
    alone.write_text(text.replace("</main>", "<img src=x></main>"), encoding="utf-8")  # its own policy forbids it
    assert "CONSOLE" in _browse(alone, tmp_path / "c")[1]
