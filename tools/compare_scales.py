"""Which criterion the consistency filter gives to an instruction, by scale, where the right answer is known.

On the model that ships with the package: instructions that it wrote itself, each of a kind that one criterion is about
(questions honesty, tasks helpfulness, misdeeds harmlessness), directions from other instructions of its own. What the
oracle cannot read is left out, and so is the general criterion, which fits every kind.
"""

from __future__ import annotations

from icon2_rt import demo
from icon2_rt.pipeline import chat_frame, consistency
from icon2_rt.pipeline.directions import extract
from icon2_rt.pipeline.instructions import synthesise, without_duplicates
from icon2_rt.pipeline.loading import end_tokens, load_runtime
from icon2_rt.tiny.oracle import read_instruction
from icon2_rt.tiny.world import CRITERION_OF_KIND


def main() -> None:
    config = demo.config()
    rt = load_runtime(config)
    frame = chat_frame(rt.tokenizer, end_tokens(rt))
    criteria = {name: c for name, c in config.resolved_criteria().items() if name in CRITERION_OF_KIND.values()}
    drawn, _ = synthesise(rt, frame, range(300), config.instructions, config.seed, room=rt.spec.max_length // 2)
    written, _ = without_duplicates(drawn)
    directions = extract(rt, frame, criteria, written[:100])
    found = [(item, read_instruction(item.text)) for item in written[100:]]
    known = [(item, CRITERION_OF_KIND[kind_and_want[0]]) for item, kind_and_want in found if kind_and_want is not None]
    items = [item for item, _ in known]
    plain = consistency.projections(rt, frame, items, directions)
    contrasts = consistency.contrasts(rt, frame, items, directions, criteria)
    print(f"{len(items)} instructions; c* is what the instruction is about in")
    for scale, projected in (("raw", plain), ("zscore", plain), ("contrast", contrasts)):
        verdict = consistency.judge(projected, directions.names, scale)
        right = sum(verdict.names[c] == about for c, (_, about) in zip(verdict.best.tolist(), known, strict=True))
        print(f"  {scale:9}{right / len(items):4.0%}")
    print("  chance    33%")


if __name__ == "__main__":
    main()
