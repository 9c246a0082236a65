"""Host memory to device memory and back without waiting: pinned memory that is allocated once and used in turns.

Pinned memory is what a GPU copies from and to while the host goes on. Allocating it costs the host more than a decode
step, so a :class:`Staging` and a :class:`Landing` allocate theirs when they are made. On a CPU the same code runs over
ordinary memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Every array of an upload and every field of an arena begins at a multiple of this: a kernel that was compiled for
# aligned tensors finds them aligned.
ALIGNMENT = 256
# What is waiting to go up at once seldom exceeds this; a larger upload goes through in parts.
STAGING_BYTES = 8 << 20
# Two ranges that are nearer to each other than this go up as one: the bytes between them take less time than a copy.
NEAR = 64 << 10


def pinned(n_bytes: int, device: torch.device) -> Tensor:
    """Host memory ``[n_bytes]`` uint8 that ``device`` copies from and to by itself; nothing else allocates any."""
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")


def end_of_work(device: torch.device) -> torch.cuda.Event | None:
    """What has happened once all that ``device`` was given so far is done; another device may be the current one. None
    where the host does the work itself, which is done by then."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class Staging:
    """A circular buffer of pinned memory through which everything goes up.

    The copies are enqueued on the current stream. A part of the buffer is written again once its copies are done: with
    a buffer of a few megabytes that is long before its turn comes.
    """

    def __init__(self, device: torch.device, n_bytes: int = STAGING_BYTES):
        self.device = device
        self._memory = pinned(n_bytes, device)
        self._bytes = self._memory.numpy()
        self._head = 0
        self._in_use: deque[tuple[int, int, torch.cuda.Event]] = deque()  # [begin, end), oldest first

    def send(self, parts: Sequence[tuple[np.ndarray, Tensor]]) -> None:
        """Copy each source (contiguous bytes, ``[n]`` uint8) into its target (``[n]`` uint8, contiguous, on the
        device): one copy a part, unless it exceeds the buffer. The sources may be changed when this returns."""
        for source, target in parts:
            size = len(self._bytes)
            for start in range(0, len(source), size):
                some = source[start : start + size]
                begin = self._take(len(some))
                end = begin + len(some)
                self._bytes[begin:end] = some
                target[start : start + size].copy_(self._memory[begin:end], non_blocking=True)
                event = end_of_work(self.device)
                if event is not None:
                    self._in_use.append((begin, end, event))

    def _take(self, n: int) -> int:
        """The next ``n`` bytes of the buffer, free to be written."""
        begin = self._head if self._head + n <= len(self._bytes) else 0
        self._head = begin + n
        while self._in_use and self._in_use[0][2].query():
            self._in_use.popleft()
        while any(b < begin + n and begin < e for b, e, _ in self._in_use):
            self._in_use.popleft()[2].synchronize()
        return begin

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """``arrays`` as tensors on the device under the same names: views of one new buffer, filled by one copy."""
        places: list[tuple[str, np.ndarray, int]] = []
        total = 0
        for name, array in arrays.items():
            places.append((name, array, total))
            total += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        packed = np.zeros(total, dtype=np.uint8)
        memory = torch.empty(total, dtype=torch.uint8, device=self.device)
        for _, array, begin in places:
            packed[begin : begin + array.nbytes] = as_bytes(array)
        self.send([(packed, memory)])
        return {name: _view(memory, begin, array.shape, array.dtype) for name, array, begin in places}


class Landing:
    """Pinned memory in which the results of a step arrive: a slot for each step whose results were not read yet."""

    def __init__(self, source: Tensor, slots: int):
        self._source = source  # [n] uint8, on the device
        self._free = [pinned(len(source), source.device) for _ in range(slots)]

    def fetch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The slot into which the source is copied as it is after all that was enqueued, and what has happened when it
        is there. :meth:`release` gives it back. A caller that never does gets new memory for every fetch."""
        slot = self._free.pop() if self._free else pinned(len(self._source), self._source.device)
        slot.copy_(self._source, non_blocking=True)
        return slot, end_of_work(self._source.device)

    def release(self, slot: Tensor) -> None:
        self._free.append(slot)


@dataclass(frozen=True)
class Field:
    """A tensor of an :class:`Arena`: its shape, dtype and first value."""

    shape: tuple[int, ...]
    dtype: type
    value: float = 0


class Arena:
    """Tensors that only the host writes, side by side in one buffer on the device, with a mirror of it on the host.

    The host changes the mirror, says what it has touched, and brings that up with few copies. The tensors keep their
    addresses.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device):
        self._place: dict[str, int] = {}
        total = 0
        for name, field in fields.items():
            self._place[name] = total
            total += -(-field.dtype().itemsize * int(np.prod(field.shape)) // ALIGNMENT) * ALIGNMENT
        self._mirror = np.zeros(total, dtype=np.uint8)
        self._memory = torch.zeros(total, dtype=torch.uint8, device=device)
        self._touched: list[tuple[int, int]] = []
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        for name, field in fields.items():
            begin, dtype = self._place[name], np.dtype(field.dtype)
            end = begin + dtype.itemsize * int(np.prod(field.shape))
            self.host[name] = self._mirror[begin:end].view(dtype).reshape(field.shape)
            self.host[name][...] = field.value
            self.device[name] = _view(self._memory, begin, field.shape, dtype)
        self._memory.copy_(torch.from_numpy(self._mirror))

    def touch(self, name: str, begin: int, end: int) -> None:
        """Elements ``[begin, end)`` of the flattened field have changed on the host."""
        if end > begin:
            size = self.host[name].itemsize
            self._touched.append((self._place[name] + begin * size, self._place[name] + end * size))

    def put(self, name: str, values: np.ndarray) -> None:
        """Write ``values`` to the beginning of a field (along its first dimension) and mark them as touched."""
        self.host[name][: len(values)] = values
        self.touch(name, 0, values.size)

    def flush(self, staging: Staging) -> None:
        """Bring up what was touched: one copy for all that is near to each other."""
        ranges: list[tuple[int, int]] = []
        for begin, end in sorted(self._touched):
            if ranges and begin <= ranges[-1][1] + NEAR:
                ranges[-1] = (ranges[-1][0], max(ranges[-1][1], end))
            else:
                ranges.append((begin, end))
        self._touched.clear()
        staging.send([(self._mirror[begin:end], self._memory[begin:end]) for begin, end in ranges])


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, ``[n]`` uint8."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _view(memory: Tensor, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    end = begin + dtype.itemsize * int(np.prod(shape))
    return memory[begin:end].view(_TORCH[dtype]).view(shape)


_TORCH = {
    np.dtype(numpy): torch.from_numpy(np.empty(0, dtype=numpy)).dtype
    for numpy in (np.bool_, np.uint8, np.int32, np.int64, np.float32)
}
