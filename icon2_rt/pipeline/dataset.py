"""The dataset's records: what TRL's DPOTrainer reads, and the columns that say where each pair came from.

``prompt``, ``chosen`` and ``rejected`` are lists of chat messages. No column has a name that TRL gives a meaning of its
own (``…_ids``, ``ref_…_logps``, ``images``, ``tools``): extra columns must be harmless. One is meant to be read by TRL:
``chat_template_kwargs``, where a run sets variables of the chat template.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

PER_RESPONSE = {
    "tokens": "generated tokens, the ending token included",
    "finish": "why it ended: eos, stop_string or length (cut off by the limit)",
    "logprob": "sum of log-probabilities (nats) under the steered model that wrote it",
    "logprob_unsteered": "the same under the unsteered model",
    "logprob_unsteered_mean": "the same per token",
    "entropy": "mean entropy (nats) of the unsteered model's next-token distributions along it",
    "repetition": "share of its 4-grams of tokens that occurred before in it",
    "seed": "row seed: reproduces this response alone",
}
PER_TOKEN = {
    "token_logprobs": "log-probability of every token under the unsteered model",
    "token_entropies": "entropy of the unsteered model's distribution at every token",
}
# TRL's own name for it: a column that means this to its trainers.
TEMPLATE_VARIABLES = "chat_template_kwargs"
REWARD = {"reward": "what the judge gave it"}
COLUMNS = {
    "prompt": "the instruction as a one-message chat",
    "chosen": "the response steered towards the criterion",
    "rejected": "the response steered away from it",
    "id": "number of the instruction among the draws",
    "criterion": "c*, the criterion whose direction steered the pair",
    "score": "consistency score of the instruction under c*",
    "margin": "its distance to the second-best criterion (null with one criterion)",
    "strength_positive": "γ⁺ in residual units (the mean over the controlled blocks)",
    "strength_negative": "γ⁻ in residual units (the mean over the controlled blocks)",
    "first_difference": "first token position where the two responses differ (null: identical)",
    **{f"{side}_{name}": text for side in ("chosen", "rejected") for name, text in PER_RESPONSE.items()},
}
# Columns that only some runs have, in the order in which they follow those above.
OPTIONAL = {
    **{f"{side}_{name}": text for side in ("chosen", "rejected") for name, text in (PER_TOKEN | REWARD).items()},
    "neutral": "the unsteered response",
    **{f"neutral_{name}": text for name, text in (PER_RESPONSE | PER_TOKEN).items()},
    "responses": "all responses of the ladder, from γ⁺ to γ⁻",
    "strengths": "strength of each of them in residual units",
    "weights": "weight of each, in proportion to its place between γ⁻ (0) and γ⁺; they add up to 1",
    **{f"responses_{name}": f"of each: {text}" for name, text in (PER_RESPONSE | PER_TOKEN).items()},
    "shared_tokens": "how many tokens all responses begin with: written unsteered, before they part",
    "shared_seed": "row seed of that beginning",
    TEMPLATE_VARIABLES: "the chat template's variables that the run set; TRL's trainers render the chats with them",
}


def columns_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a dataset by one of its records, in their order, each with its meaning."""
    return {name: text for name, text in (COLUMNS | OPTIONAL).items() if name in record}


def schema(names: Iterable[str] = COLUMNS) -> pyarrow.Schema:
    """The Parquet types of the columns."""
    import pyarrow as pa

    chat = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    special: dict[str, Any] = {
        **dict.fromkeys(("prompt", "chosen", "neutral", "rejected"), chat),
        "responses": pa.list_(chat),
        **dict.fromkeys(("score", "margin", "strength_positive", "strength_negative"), pa.float64()),
        **dict.fromkeys(("strengths", "weights"), pa.list_(pa.float64())),
        **dict.fromkeys(("id", "first_difference", "shared_tokens"), pa.int64()),
        "shared_seed": pa.uint64(),
        "criterion": pa.string(),
    }
    by_ending = {
        **dict.fromkeys(("logprob", "logprob_unsteered", "logprob_unsteered_mean"), pa.float64()),
        **dict.fromkeys(("entropy", "repetition", "reward"), pa.float64()),
        **dict.fromkeys(PER_TOKEN, pa.list_(pa.float32())),
        "tokens": pa.int64(),
        "finish": pa.string(),
        "seed": pa.uint64(),
    }

    def kind(name: str) -> pyarrow.DataType:
        if name in special:
            return special[name]
        side, _, figure = name.partition("_")
        return pa.list_(by_ending[figure]) if side == "responses" else by_ending[figure]

    return pa.schema([(name, kind(name)) for name in names])


def to_parquet(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Records as one Parquet file: the same records give the same bytes (for one version of pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = columns_of(records[0]) if records else COLUMNS
    types = schema(name for name in names if name != TEMPLATE_VARIABLES)
    if TEMPLATE_VARIABLES in names:  # whatever the template takes
        types = types.append(pa.field(TEMPLATE_VARIABLES, pa.infer_type([records[0][TEMPLATE_VARIABLES]])))
    table = pa.Table.from_pylist(list(records), schema=types)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def rendered_with(records: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records that tell a trainer which variables the chat template is to have."""
    told = {TEMPLATE_VARIABLES: dict(variables)} if variables else {}
    return [{**record, **told} for record in records]


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data)).to_pylist()


def card(title: str, body: str, columns: Mapping[str, str] = COLUMNS) -> str:
    """A dataset card: its head tells ``datasets.load_dataset(folder)`` which files are the data."""
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in columns.items())
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# {title}

{body}

`report.html` shows every figure, `report.json` has them, and `manifest.json` says what the run was made with.

## Use

```python
from datasets import load_dataset

dataset = load_dataset(".", split="train")  # this folder; TRL's DPOTrainer takes it as it is
```

## Columns

| column | meaning |
|---|---|
{rows}
"""
