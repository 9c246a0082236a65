"""Whose turn it is: one thread at a time works with an engine's memory, the others wait."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class Turns:
    """A turn is a ``with`` block. The thread that has it may take it again, so a call may be made inside a call."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._left: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1
        try:
            if self._depth == 1:
                # A thread that is new to torch takes over its number of threads; our own kernels ask OpenMP for it.
                torch.get_num_threads()
                self._clear_up()
        except BaseException:  # no __exit__ follows: the turn would never end
            self._depth -= 1
            self._lock.release()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            if self._depth == 1:
                self._clear_up()
        finally:
            self._depth -= 1
            self._lock.release()
        self._clear_up_if_free()  # what was left between the last look and the release

    def later(self, work: Callable[[], None]) -> None:
        """Do ``work`` now if it is nobody's turn, else at the end of the present one. Never waits.

        For what a garbage collector runs: it comes at any moment in any thread, in the middle of a step too, and a
        thread that it makes wait may hold what the thread that it waits for needs.
        """
        self._left.append(work)
        self._clear_up_if_free()

    def _clear_up_if_free(self) -> None:
        if self._left and self._lock.acquire(blocking=False):
            try:
                if self._depth == 0:
                    self._depth = 1
                    try:
                        self._clear_up()
                    finally:
                        self._depth = 0
            finally:
                self._lock.release()

    def _clear_up(self) -> None:
        while self._left:
            self._left.popleft()()


class Stream(Iterator[T]):
    """The outputs of a generator; each is worked for in a turn of its own, so that other calls may come between.

    Any thread may take the next output, several may share a stream, and it may be let go of or closed before its end.
    """

    def __init__(self, turns: Turns, outputs: Generator[T, None, None]) -> None:
        self._turns, self._outputs = turns, outputs

    def __next__(self) -> T:
        with self._turns:
            return next(self._outputs)

    def close(self) -> None:
        """Give everything back that the stream holds; it has no further output."""
        with self._turns:
            self._outputs.close()

    def __del__(self) -> None:
        self._turns.later(self._outputs.close)


_shared: defaultdict[torch.device, Turns] = defaultdict(Turns)


def turns_on(device: torch.device, kernels: bool) -> Turns:
    """The turns of an engine whose ops are Triton's (``kernels``) or not.

    Engines on CPUs have their own: their ops share nothing. Two engines on one CUDA device take turns: while one
    captures a graph, the other may not allocate. So do all whose kernels Triton interprets: the interpreter keeps the
    place of a launch in variables of the process.
    """
    return _shared[device] if device.type == "cuda" or kernels else Turns()
