"""Icon²: preference pairs from a model's own directions. The four steps are plain functions over a Runtime; a run puts
them in a folder that can be continued.

    from icon2_rt.pipeline import RunConfig, run

    result = run(RunConfig.load("examples/tiny.toml"), "runs/tiny")

``directions.extract``, ``instructions.synthesise``, ``consistency.judge`` and ``pairs.decode`` are the steps
themselves.
"""

from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.runner import RunResult, find_strengths, run
from icon2_rt.pipeline.templates import ChatFrame, chat_frame

__all__ = ["ChatFrame", "Criterion", "RunConfig", "RunResult", "chat_frame", "find_strengths", "run"]
