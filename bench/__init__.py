"""Measurements of the runtime. Nothing here asserts a speed; `python -m bench` says what there is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
