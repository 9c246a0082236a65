"""What the method is compared with, on the same engine and in the same records: four recipes for preference pairs.

- *best_of_n*: n samples, an outside judge; the best is chosen, the worst rejected (n = 5 in the paper's comparison).
- *self_rewarding*: the same with the model as its own judge: it grades each response from 1 to 5, several times, and
  the mean counts; or by likelihood, how much likelier a response is under the criteria's positive system prompts than
  under their negative ones, for models that cannot grade.
- *self_refine*: n samples (3), and a refinement that the model writes with all of them before it. The refinement is
  chosen, the first sample rejected.
- *opposing_prompts*: one response under a criterion's positive system prompt, one under its negative one.

The paper names these and gives their budgets; prompts, votes and the choice of the rejected sample are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from icon2_rt.pipeline.config import BaselineConfig, PairsConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.judges import Judge, verdicts
from icon2_rt.pipeline.pairs import Answer, preference, response_sampling
from icon2_rt.pipeline.sampling import neutral, sound, stage_seed
from icon2_rt.pipeline.templates import Chat, ChatFrame

if TYPE_CHECKING:
    from icon2_rt import Completion, Runtime

GRADE = """Read an instruction and a response to it, and grade the response from 1 to 5.

1: wrong, harmful or useless. 2: poor. 3: acceptable. 4: good. 5: excellent; true, harmless, and all that was asked for.

Instruction:
{instruction}

Response:
{response}

Answer with the grade alone, one digit from 1 to 5."""

REFINE = """{instruction}

Here are {n} drafts of an answer:

{drafts}

Write one answer that is better than all of them: keep what is right in them, mend what is wrong, add what is missing. \
Give the answer alone."""

# Room for a grade that comes with a word or a sign in front of it.
_GRADE_TOKENS = 8


def make(
    rt: Runtime,
    frame: ChatFrame,
    instructions: Sequence[Instruction],
    given: Sequence[str | None],
    baseline: BaselineConfig,
    config: PairsConfig,
    criteria: Mapping[str, Criterion],
    eos_token_ids: Sequence[int],
    seed: int,
    judge: Judge | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The records of one recipe, in the order of the instructions, and why some instructions gave none.

    Args:
        given: a criterion for each instruction or None; opposing prompts take the criteria by turns where it is None.
        judge: what best-of-n asks.
    """
    recipe = _Recipe(rt, frame, baseline, config, criteria, tuple(eos_token_ids), seed)
    if baseline.recipe == "opposing_prompts":
        names = list(criteria)
        chosen_by = [name or names[item.id % len(names)] for item, name in zip(instructions, given, strict=True)]
        return recipe.opposing_prompts(instructions, chosen_by), Counter()
    samples = recipe.sample(instructions)
    if baseline.recipe == "self_refine":
        return recipe.self_refine(instructions, samples)
    with rt.usage.during("judging"):
        if baseline.recipe == "best_of_n":
            if judge is None:
                raise ValueError("best_of_n needs a judge")
            rewards = recipe.judged(instructions, samples, judge)
        elif baseline.self_judge == "grade":
            rewards = recipe.graded(instructions, samples)
        else:
            rewards = recipe.likelier(instructions, samples)
    return recipe.best_and_worst(instructions, samples, rewards)


class _Recipe:
    """The parts of the recipes; they share the runtime and how responses are drawn."""

    def __init__(
        self,
        rt: Runtime,
        frame: ChatFrame,
        baseline: BaselineConfig,
        config: PairsConfig,
        criteria: Mapping[str, Criterion],
        eos: tuple[int, ...],
        seed: int,
    ):
        self.rt, self.frame, self.baseline, self.config = rt, frame, baseline, config
        self.criteria, self.eos, self.seed = criteria, eos, seed
        self.sampling = response_sampling(config, eos, frame.end_string)

    def sample(self, instructions: Sequence[Instruction]) -> list[list[Completion]]:
        """n responses to every instruction, over one copy of the prompt's KV."""
        outputs = self.rt.generate_branches(
            [self.frame.messages(item.text) for item in instructions],
            [None] * self.baseline.n_samples,
            seed=stage_seed(self.seed, "pairs"),
            sample_ids=[item.id for item in instructions],
            generation_config=self.sampling,
        )
        return [list(sound(output.branches)) for output in outputs]

    def records(
        self,
        instructions: Sequence[Instruction],
        pairs: Sequence[tuple[Completion, Completion]],
        rewards: Sequence[tuple[float, float]] | None = None,
    ) -> list[dict[str, Any]]:
        chats = [self.frame.messages(item.text) for item in instructions]
        with self.rt.usage.during("figures"):
            scored = self.rt.score([chat for chat in chats for _ in range(2)], [c for pair in pairs for c in pair])
        found = []
        for n, (item, pair) in enumerate(zip(instructions, pairs, strict=True)):
            given = rewards[n] if rewards is not None else (None, None)
            chosen, rejected = (
                Answer(pair[k], scored[2 * n + k], self.frame.said(pair[k]), given[k]) for k in range(2)
            )
            found.append(preference(item, chosen, rejected, self.config.per_token))
        return found

    def best_and_worst(
        self,
        instructions: Sequence[Instruction],
        samples: Sequence[Sequence[Completion]],
        rewards: Sequence[Sequence[float | None]],
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Pairs of the best and the worst sample; an instruction whose samples are all equally good gives none."""
        dropped: Counter[str] = Counter()
        items, pairs, figures = [], [], []
        for item, completions, values in zip(instructions, samples, rewards, strict=True):
            rated = [(value, -k) for k, value in enumerate(values) if value is not None]
            if len(rated) < 2:
                dropped["ungraded"] += 1
            elif max(rated)[0] == min(rated)[0]:
                dropped["tied"] += 1
            else:
                (high, best), (low, worst) = max(rated), min(rated)
                items.append(item)
                pairs.append((completions[-best], completions[-worst]))
                figures.append((high, low))
        return (self.records(items, pairs, figures) if items else []), dropped

    def judged(
        self, instructions: Sequence[Instruction], samples: Sequence[Sequence[Completion]], judge: Judge
    ) -> list[list[float | None]]:
        asked = [item.text for item, several in zip(instructions, samples, strict=True) for _ in several]
        said = [self.frame.said(completion) for several in samples for completion in several]
        return self._by_instruction(samples, verdicts(judge, asked, said))

    def graded(
        self, instructions: Sequence[Instruction], samples: Sequence[Sequence[Completion]]
    ) -> list[list[float | None]]:
        """The mean of the model's own grades; None where no vote is a grade, or the prompt has no room."""
        room = self.rt.spec.max_length - _GRADE_TOKENS
        chats, places = [], []
        for i, (item, several) in enumerate(zip(instructions, samples, strict=True)):
            for k, completion in enumerate(several):
                chat = self.frame.messages(GRADE.format(instruction=item.text, response=self.frame.said(completion)))
                if self.frame.length(chat) <= room:
                    chats.append(chat)
                    places.append((i, k))
        grades: list[list[float | None]] = [[None] * len(several) for several in samples]
        if chats:
            outputs = self.rt.generate_branches(
                chats,
                [None] * self.baseline.votes,
                seed=stage_seed(self.seed, "grades"),
                sample_ids=[(instructions[i].id * len(samples[i]) + k) % 2**64 for i, k in places],
                generation_config=neutral(
                    temperature=1.0, top_p=1.0, max_new_tokens=_GRADE_TOKENS, eos_token_id=self.eos
                ),
            )
            for (i, k), output in zip(places, outputs, strict=True):
                votes = [grade for vote in output.branches if (grade := read_grade(vote.text or "")) is not None]
                grades[i][k] = fmean(votes) if votes else None
        return grades

    def likelier(
        self, instructions: Sequence[Instruction], samples: Sequence[Sequence[Completion]]
    ) -> list[list[float | None]]:
        """Nats per token by which a response is likelier under positive prompts than under negative ones, the mean
        over the criteria."""
        said = [completion for several in samples for completion in several]
        totals = [0.0] * len(said)
        for criterion in self.criteria.values():
            for sign, system in ((1, criterion.positive), (-1, criterion.negative)):
                chats = [
                    self.frame.messages(item.text, system=system)
                    for item, several in zip(instructions, samples, strict=True)
                    for _ in several
                ]
                for n, scored in enumerate(self.rt.score(chats, said)):
                    totals[n] += sign * fmean(scored.logprobs) / len(self.criteria)
        return self._by_instruction(samples, totals)

    @staticmethod
    def _by_instruction(samples: Sequence[Sequence[Any]], values: Sequence[float]) -> list[list[float | None]]:
        left = iter(values)
        return [[next(left) for _ in several] for several in samples]

    def self_refine(
        self, instructions: Sequence[Instruction], samples: Sequence[Sequence[Completion]]
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        room = self.rt.spec.max_length - self.config.max_new_tokens
        dropped: Counter[str] = Counter()
        items, firsts, chats = [], [], []
        for item, drafts in zip(instructions, samples, strict=True):
            chat: Chat = self.frame.messages(
                REFINE.format(
                    instruction=item.text,
                    n=len(drafts),
                    drafts="\n\n".join(
                        f"Draft {k}: {self.frame.said(draft)}" for k, draft in enumerate(drafts, start=1)
                    ),
                )
            )
            if self.frame.length(chat) > room:
                dropped["too long"] += 1
                continue
            items.append(item)
            firsts.append(drafts[0])
            chats.append(chat)
        if not items:
            return [], dropped
        with self.rt.usage.during("refinement"):
            refined = self.rt.generate(
                chats,
                seed=stage_seed(self.seed, "refinements"),
                sample_ids=[item.id for item in items],
                generation_config=self.sampling,
            )
        return self.records(items, list(zip(sound(refined), firsts, strict=True))), dropped

    def opposing_prompts(self, instructions: Sequence[Instruction], names: Sequence[str]) -> list[dict[str, Any]]:
        sides = []
        for side in ("positive", "negative"):
            chats = [
                self.frame.messages(item.text, system=getattr(self.criteria[name], side))
                for item, name in zip(instructions, names, strict=True)
            ]
            common = self.config.noise == "common"
            sides.append(
                self.rt.generate(
                    chats,
                    seed=stage_seed(self.seed, "pairs" if common else f"pairs/{side}"),
                    sample_ids=[item.id for item in instructions],
                    generation_config=self.sampling,
                )
            )
        records = self.records(instructions, list(zip(*map(sound, sides), strict=True)))
        return [{**record, "criterion": name} for record, name in zip(records, names, strict=True)]


def read_grade(text: str) -> int | None:
    """The first whole number in an answer, if it is a grade."""
    found = re.search(r"\d+(?:[.,]\d+)?", text)
    return int(found[0]) if found and found[0] in ("1", "2", "3", "4", "5") else None
