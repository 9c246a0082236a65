"""What comes back from the runtime: plain dataclasses, no tensors, nothing that refers to the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from icon2_rt.notebook import short, table

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]
FinishReason = Literal["eos", "stop_string", "length", "error"]


@dataclass(frozen=True)
class Completion:
    """One finished branch.

    ``token_ids`` are the generated tokens, the ending eos included; ``logprobs`` their log-softmax under the raw
    logits of the steered model (before any processor), natural log; ``text`` is how they read behind the prompt,
    without special tokens (None without a tokenizer). ``seed`` is the row seed: passed as ``seed=[seed]`` it reproduces
    the row alone (None when decoding was greedy).

    ``finish_reason`` "error": the logits of the next token were not finite (a steering that is too strong for the
    dtype, or a bad weight). What was generated before is there; other branches and prompts are not touched by it.

    ``message`` is the content of the assistant's message that answers a chat, where that is not ``text``: it begins
    with what the chat's last message had begun, and leaves out a first space that the chat template would double.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    seed: int | None
    message: str | None = None

    def __repr__(self) -> str:
        """Short: the text's beginning, how many tokens there are, and why it ended. ``asdict`` gives everything."""
        text = short(self.text) if self.text is not None else short_ids(self.token_ids)
        return f"Completion({text}, {_many(len(self.token_ids), 'token')}, {self.finish_reason})"


@dataclass(frozen=True)
class BranchedOutput:
    """The K branches of one prompt, in the order in which they were asked for; ``index`` is the prompt's place in the
    call, and ``sample`` the number of this sample of it (0 to n - 1, where ``n`` samples were asked for)."""

    index: int
    prompt: Prompt
    branches: list[Completion]
    sample: int = 0

    def __repr__(self) -> str:
        return f"BranchedOutput({_head(self)}, branches={self.branches})"


@dataclass(frozen=True)
class PairedOutput:
    """The positive and the negative branch of one prompt; ``index`` is the prompt's place in the call, ``sample`` the
    number of this sample of it, and ``chat_template_kwargs`` are the variables that the call gave the chat template."""

    index: int
    prompt: Prompt
    positive: Completion
    negative: Completion
    chat_template_kwargs: Mapping[str, Any] | None = None
    sample: int = 0

    def __repr__(self) -> str:
        return f"PairedOutput({_head(self)}, positive={self.positive}, negative={self.negative})"

    def to_preference(self) -> dict[str, Any]:
        """TRL's preference record ``{prompt, chosen, rejected}``: messages if the prompt was a chat, else strings.

        A last message of the assistant, which both responses continue, is the beginning of both in the record.

        Raises:
            ValueError: the prompt was token ids, or the runtime had no tokenizer: there is no text to write. A branch
                ended with an error: there is no preference in it.
        """
        for side in ("positive", "negative"):
            if getattr(self, side).finish_reason == "error":
                raise ValueError(
                    f"the {side} branch of pair {self.index} ended with an error (its logits are not finite): leave "
                    f"the pair out, and lower the strength"
                )
        if self.positive.text is None or self.negative.text is None:
            raise ValueError("to_preference() needs text, and this runtime was made without a tokenizer")
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "chosen": self.positive.text, "rejected": self.negative.text}
        messages = [dict(part) for part in self.prompt if isinstance(part, Mapping)]
        if not messages:
            raise ValueError("to_preference() needs a text or chat prompt; this one was given as token ids")
        begun = messages.pop()["content"] if messages[-1].get("role") == "assistant" else ""

        def answer(completion: Completion) -> list[dict[str, str]]:
            content = completion.message if completion.message is not None else begun + (completion.text or "")
            return [{"role": "assistant", "content": content}]

        # TRL's trainers read the variables from each record.
        variables = {"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}
        return {"prompt": messages, "chosen": answer(self.positive), "rejected": answer(self.negative), **variables}


Output = TypeVar("Output", Completion, BranchedOutput, PairedOutput)


class OutputList(list[Output]):
    """What a call that waits for all of its outputs gives: a list, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        columns: dict[str, None] = {}  # in order, each once
        rows = []
        for place, output in enumerate(self):
            row = _cells(output, place)
            columns.update(dict.fromkeys(row))
            rows.append(row)
        return table(_many(len(self), "output"), list(columns), ([row.get(name) for name in columns] for row in rows))


def _cells(output: Completion | BranchedOutput | PairedOutput, place: int) -> dict[str, object]:
    """An output as a row of a table, by column."""
    if isinstance(output, Completion):
        return {"": place, "completion": _whole(output), "tokens": len(output.token_ids), "end": output.finish_reason}
    branches = (
        {"positive": output.positive, "negative": output.negative}
        if isinstance(output, PairedOutput)
        else {f"branch {k}": branch for k, branch in enumerate(output.branches)}
    )
    where = f"{output.index}.{output.sample}" if output.sample else output.index
    texts = {name: _whole(branch) for name, branch in branches.items()}
    return {"": where, "prompt": _prompt_text(output.prompt), **texts}


def _whole(completion: Completion) -> str:
    text = completion.text if completion.text is not None else short_ids(completion.token_ids)
    return text if completion.finish_reason != "error" else f"{text} (ended with an error)"


def _prompt_text(prompt: Prompt) -> str:
    """A prompt for people: its text, its messages one after the other, or its ids."""
    if isinstance(prompt, str):
        return prompt
    messages = [part for part in prompt if isinstance(part, Mapping)]
    if messages:
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages)
    return short_ids([part for part in prompt if isinstance(part, int)])


def short_ids(ids: Sequence[int], most: int = 8) -> str:
    """The first few ids."""
    return f"[{', '.join(map(str, ids[:most]))}{', …' if len(ids) > most else ''}]"


def _head(output: BranchedOutput | PairedOutput) -> str:
    sample = f", sample={output.sample}" if output.sample else ""
    text = _prompt_text(output.prompt)
    prompt = short(text) if isinstance(output.prompt, str) or not text.startswith("[") else text
    return f"index={output.index}{sample}, prompt={prompt}"


@dataclass(frozen=True)
class Scored:
    """Teacher-forced figures of one completion: natural-log probability of each token, and the entropy (nats) of the
    distribution that it was scored under. Not a number from where the logits are not finite."""

    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]


@dataclass(frozen=True)
class Fired:
    """How much one term of a steering acted, over the rows of a call.

    A term acts on a triple (row, block, position) if its α or β is nonzero at the block, the position is in the
    steering's scope, and the state of that position after that block was computed. The counts follow these rules:

    - A row's positions are those of its prompt and of its generated tokens except the last one, which is never fed.
    - Positions that several rows share count once for each row: two branches that steer a common prompt alike count
      twice, although the prompt was prefilled once.
    - Prefill computes no state after the last block, because nothing reads it. So under scope "all" the prompt
      positions before the last one do not count at the last block. ``Runtime.score`` computes it, and there they count.
    - Steps that a device runs beyond a row's end do not count. A row that was running when its stream was closed counts
      with the tokens that had come back.

    Attributes:
        branch: the argument that the steering came from: ``"steering"``, ``"positive"``, ``"branches[0]"`` …
        direction: name of the term's direction. term: the term's place in its steering, from 0.
        scope: of the steering.
        rows: rows on which the term acted at least once. idle: rows on which it could have acted and did not: a row
            with scope "generated" whose first token ended it.
        layers: the blocks (0-based) after which it acted on some row.
        tokens: steered positions, added up over the rows. total: triples (row, block, position) on which it acted.
    """

    branch: str
    direction: str
    term: int
    scope: str
    rows: int
    idle: int
    layers: tuple[int, ...]
    tokens: int
    total: int

    @property
    def blocks(self) -> int:
        """After how many blocks the term acted."""
        return len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fired:
        return cls(**{**record, "layers": tuple(record["layers"])})

    def __str__(self) -> str:
        idle = f"; {_many(self.idle, 'row')} ended before it could act" if self.idle else ""
        return (
            f"{self.branch}: {self.direction} (term {self.term}, scope {self.scope!r}) acted on "
            f"{_many(self.rows, 'row')} × {_many(self.blocks, 'block')} × {_many(self.tokens, 'token')}, "
            f"{_many(self.total, 'time')} in all{idle}"
        )


def add_up(fired: Iterable[Fired]) -> tuple[Fired, ...]:
    """The counts of several calls as those of one: entries of the same branch, direction, term and scope are added."""
    by_key: dict[tuple[str, str, int, str], Fired] = {}
    for one in fired:
        key = (one.branch, one.direction, one.term, one.scope)
        before = by_key.get(key)
        if before is None:
            by_key[key] = one
            continue
        by_key[key] = replace(
            before,
            rows=before.rows + one.rows,
            idle=before.idle + one.idle,
            layers=tuple(sorted({*before.layers, *one.layers})),
            tokens=before.tokens + one.tokens,
            total=before.total + one.total,
        )
    return tuple(by_key.values())


@dataclass(frozen=True)
class Paths:
    """Which code a call ran through.

    Attributes:
        backend: of the runtime. prefill_attention, decode_attention: the implementations of attention; None where no
            prefill pass, or no decode step, was run.
        prefill_passes: forward passes of prefill.
        graph_steps: decode steps that were replays of a CUDA graph, by the rows that the graph has.
        captured_steps, repeated_steps: on a CPU, steps that the extension recorded, and steps that repeated a record.
        plain_steps: steps that were run one operation after another, by the reason why.
        shared_items: attention items that were read for more than one row at once, the most at one time.
            sharing_rows: the rows that they were read for then.
        fallbacks: warnings of this call: smaller prefill passes, graphs that were given up.
    """

    backend: str
    prefill_attention: str | None = None
    decode_attention: str | None = None
    prefill_passes: int = 0
    graph_steps: Mapping[int, int] = field(default_factory=dict)
    captured_steps: int = 0
    repeated_steps: int = 0
    plain_steps: Mapping[str, int] = field(default_factory=dict)
    shared_items: int = 0
    sharing_rows: int = 0
    fallbacks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: rows are texts there."""
        graph_steps = {str(rows): n for rows, n in self.graph_steps.items()}
        return {**asdict(self), "graph_steps": graph_steps, "fallbacks": list(self.fallbacks)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Paths:
        graph_steps = {int(rows): n for rows, n in record["graph_steps"].items()}
        return cls(**{**record, "graph_steps": graph_steps, "fallbacks": tuple(record["fallbacks"])})

    def __add__(self, other: Paths) -> Paths:
        """What two calls ran through: passes and steps are added, names are listed, of sharing the larger is kept."""
        shared = max((self.shared_items, self.sharing_rows), (other.shared_items, other.sharing_rows))
        return Paths(
            backend=_both(self.backend, other.backend) or "",
            prefill_attention=_both(self.prefill_attention, other.prefill_attention),
            decode_attention=_both(self.decode_attention, other.decode_attention),
            prefill_passes=self.prefill_passes + other.prefill_passes,
            graph_steps=dict(sorted((Counter(self.graph_steps) + Counter(other.graph_steps)).items())),
            captured_steps=self.captured_steps + other.captured_steps,
            repeated_steps=self.repeated_steps + other.repeated_steps,
            plain_steps=dict(Counter(self.plain_steps) + Counter(other.plain_steps)),
            shared_items=shared[0],
            sharing_rows=shared[1],
            fallbacks=tuple(dict.fromkeys((*self.fallbacks, *other.fallbacks))),
        )

    def __str__(self) -> str:
        lines = [f"backend {self.backend}"]
        if self.prefill_attention:
            lines.append(f"prefill: {_many(self.prefill_passes, 'pass')}, attention {self.prefill_attention}")
        if self.decode_attention:
            steps = [f"{n} by the graph of {_many(rows, 'row')}" for rows, n in self.graph_steps.items()]
            if self.captured_steps:
                steps.append(f"{self.repeated_steps} repeated of {self.captured_steps} recorded")
            steps += [f"{n} op by op ({why})" for why, n in self.plain_steps.items()]
            lines.append(f"steps: {', '.join(steps)}; attention {self.decode_attention}")
        if self.shared_items:
            items = _many(self.shared_items, "attention item")
            lines.append(f"sharing: up to {items}, read for {_many(self.sharing_rows, 'row')}")
        return "\n".join([*lines, *(f"fallback: {text}" for text in self.fallbacks)])


@dataclass(frozen=True)
class LastRun:
    """What the latest call of a runtime did: see ``Runtime.last_run``.

    Attributes:
        call: "generate" (every ``generate*`` and ``stream*``), "score", "hidden_states", "project" or
            "extract_direction".
        complete: whether all of it was done; False for a stream that was closed early and for a call that raised.
        rows: rows that were decoded, or sequences that were read. tokens: tokens that they generated, or that were
            scored.
        steering: how much each term acted. Terms without strength are not listed.
        paths: which code ran.
    """

    call: str
    complete: bool
    rows: int
    tokens: int
    steering: tuple[Fired, ...]
    paths: Paths

    def __str__(self) -> str:
        ending = "" if self.complete else ", not complete"
        head = f"{self.call}: {_many(self.rows, 'row')}, {_many(self.tokens, 'token')}{ending}"
        return "\n".join([head, *map(str, self.steering), str(self.paths)])


def _both(a: str | None, b: str | None) -> str | None:
    """The names of two, each once."""
    return ", ".join(sorted({name for names in (a, b) if names for name in names.split(", ")})) or None


def _many(n: int, what: str) -> str:
    """For example "1 row" or "1,234 rows"."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}{'es' if what.endswith('s') else 's'}"
