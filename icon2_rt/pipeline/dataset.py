"""The dataset's records: what TRL's DPOTrainer reads, and the columns that say where each pair came from.

``prompt``, ``chosen`` and ``rejected`` are lists of chat messages. No column has a name that TRL gives a meaning of its
own (``…_ids``, ``ref_…_logps``, ``images``, ``tools``): extra columns must be harmless.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

PER_RESPONSE = {
    "tokens": "generated tokens, the ending token included",
    "finish": "why it ended: eos, stop_string or length (cut off by the limit)",
    "logprob": "sum of log-probabilities (nats) under the steered model that wrote it",
    "logprob_unsteered": "the same under the unsteered model",
    "repetition": "share of its 4-grams of tokens that occurred before in it",
    "seed": "row seed: reproduces this response alone",
}
COLUMNS = {
    "prompt": "the instruction as a one-message chat",
    "chosen": "the response steered towards the criterion",
    "rejected": "the response steered away from it",
    "id": "number of the instruction among the draws",
    "criterion": "c*, the criterion whose direction steered the pair",
    "score": "consistency score of the instruction under c*",
    "margin": "its distance to the second-best criterion (null with one criterion)",
    "strength_positive": "γ⁺ in residual units",
    "strength_negative": "γ⁻ in residual units",
    "first_difference": "first token position where the two responses differ (null: identical)",
    **{f"{side}_{name}": text for side in ("chosen", "rejected") for name, text in PER_RESPONSE.items()},
}


def schema() -> pyarrow.Schema:
    """The Parquet columns, in the order of :data:`COLUMNS`."""
    import pyarrow as pa

    chat = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    special: dict[str, Any] = {
        **dict.fromkeys(("prompt", "chosen", "rejected"), chat),
        **dict.fromkeys(("score", "margin", "strength_positive", "strength_negative"), pa.float64()),
        **dict.fromkeys(("id", "first_difference"), pa.int64()),
        "criterion": pa.string(),
    }
    by_ending = {
        "tokens": pa.int64(),
        "finish": pa.string(),
        "logprob": pa.float64(),
        "logprob_unsteered": pa.float64(),
        "repetition": pa.float64(),
        "seed": pa.uint64(),
    }
    return pa.schema([(name, special.get(name) or by_ending[name.partition("_")[2]]) for name in COLUMNS])


def to_parquet(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Records as one Parquet file: the same records give the same bytes (for one version of pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(records), schema=schema())
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data)).to_pylist()


def card(title: str, body: str) -> str:
    """A dataset card: its head tells ``datasets.load_dataset(folder)`` which files are the data."""
    columns = "\n".join(f"| `{name}` | {text} |" for name, text in COLUMNS.items())
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# {title}

{body}

## Use

```python
from datasets import load_dataset

dataset = load_dataset(".", split="train")  # this folder; TRL's DPOTrainer takes it as it is
```

## Columns

| column | meaning |
|---|---|
{columns}
"""
