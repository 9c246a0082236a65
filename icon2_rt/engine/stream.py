"""The engine's own CUDA stream: everything that the engine puts on a device is ordered by it alone.

Steps, uploads, replays and copies of results rely on the order in which they were enqueued, which only one stream
gives. A caller has a current stream of their own, and may change it between two outputs of a generator. So every entry
point of the engine runs in the engine's stream: it waits for what the caller had enqueued, and the caller's stream
waits for it at the end. Memory follows the same order: what one side frees is used again only after the other's work.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class EngineStream:
    """A stream of ``device``, made once; nothing at all where that is not a CUDA device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the engine's stream is the current one. It begins after what the caller's current stream was given
        before, and what that is given afterwards begins after all that happened inside, whether it raised or not."""
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)


class HasStream(Protocol):
    @property
    def stream(self) -> EngineStream: ...


S = TypeVar("S", bound=HasStream)


def in_stream(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method that runs in ``self.stream`` as a whole."""

    @wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.stream():
            return method(self, *args, **kwargs)

    return run


def steps_in_stream(
    method: Callable[Concatenate[S, P], Iterator[T]],
) -> Callable[Concatenate[S, P], Generator[T, None, None]]:
    """A generator method of which every step, and its end, runs in ``self.stream``; between two steps the caller's own
    stream is the current one, whichever that is then."""

    @wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        steps = method(self, *args, **kwargs)
        try:
            while True:
                with self.stream():
                    try:
                        item = next(steps)
                    except StopIteration:
                        return
                yield item
        finally:
            with self.stream():
                steps.close()  # type: ignore[attr-defined]  # a generator's

    return run
