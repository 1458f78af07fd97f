"""What a kernel may touch: every address inside a tensor of its own launch, no two programs racing for one.

The interpreter runs programs one after another, so a race never shows in its results. It shows here instead: each
address remembers which program touched it last, and another program may follow only if a GPU would order the two:

    the first program stores, then tl.debug_barrier() (its other warps' stores are not covered by the atomic of its
    first thread), then a scalar atomic with release semantics; the second program does an atomic with acquire
    semantics on the same address, then loads or stores.

That is what split reductions do whose last program to arrive adds up. Atomics on one address need no order among
themselves. Not seen: a program overwriting what another has only read, unless programs also run in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

# A pointer carries the number of its argument (from 1) above the 48 bits of the address, through all arithmetic.
TAG = np.uint64(48)
ADDRESS = np.uint64(2**48 - 1)


class OutOfBounds(AssertionError):
    """A load, store or atomic outside the tensor that its pointer came from."""


class Race(AssertionError):
    """Two programs, or two threads of one, in no order on one address, one of them storing."""


class Argument(NamedTuple):
    """A tensor as a kernel sees it: a view of some storage.  All sizes in bytes."""

    name: str
    tensor: Tensor
    start: int
    size: int
    storage: int
    strides: list[
        tuple[int, int]
    ]  # (stride, extent), largest first; empty where every byte belongs to the view

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Argument:
        item = tensor.element_size()
        dims = sorted(
            ((s * item, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1), reverse=True
        )
        size = sum(stride * (n - 1) for stride, n in dims) + item if tensor.numel() else 0
        inner = [*(stride * n for stride, n in dims[1:]), item]
        overlapping = any(stride < extent for (stride, _), extent in zip(dims, inner, strict=False))
        strides = [] if tensor.is_contiguous() or overlapping else dims
        return cls(name, tensor, tensor.data_ptr(), size, tensor.untyped_storage().data_ptr(), strides)

    def outside(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which of these elements of `width` bytes are not, or not wholly, the view's."""
        offsets = addresses.astype(np.int64) - self.start
        bad = (offsets < 0) | (offsets > self.size - width)
        for stride, extent in self.strides:
            index = offsets // stride
            bad |= index >= extent
            offsets = offsets - index * stride
        return bad | (offsets >= self.tensor.element_size()) if self.strides else bad


class Memory:
    """The tensors of one launch and who touched what in it. `Program` n is the n-th of the grid, in x-y-z order."""

    def __init__(self, kernel: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.kernel = kernel
        self.arguments = [Argument.of(name, tensor) for name, tensor in tensors]
        self.grid_index: tuple[int, ...] = ()
        # Per storage touched in this launch: for each byte where an element starts, the 1-based events that last
        # stored to it and last did an atomic on it. An event is what a program does between two barriers.
        self._touched: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._events: list[tuple[tuple[int, ...], int]] = []
        self._released: dict[int, dict[tuple[int, ...], int]] = {}

    def begin(self, grid_index: tuple[int, ...]) -> None:
        self.grid_index = grid_index
        self._acquired: dict[tuple[int, ...], int] = {}
        self._events.append((grid_index, 0))

    def barrier(self) -> None:
        program, epoch = self._events[-1]
        self._events.append((program, epoch + 1))

    def load(self, pointers: np.ndarray, mask: np.ndarray, width: int) -> None:
        addresses, argument = self._resolve("load", pointers, mask, width)
        if argument is None or argument.storage not in self._touched:
            return
        stored, _ = self._require_order("loads", argument, addresses)
        current = stored == len(self._events)
        if current.any():
            self._race(
                f"loads {self._element(argument, addresses[current])} that it stored itself: other threads' stores "
                "are visible only after tl.debug_barrier()"
            )

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        addresses, argument = self._resolve("store", pointers, mask, values.itemsize)
        if argument is None:
            return
        self._require_one_value_each(argument, addresses, values, mask)
        self._require_order("stores to", argument, addresses)
        stored, _ = self._touched[argument.storage]
        stored[addresses - np.uint64(argument.storage)] = len(self._events)

    def atomic(
        self, pointers: np.ndarray, mask: np.ndarray, width: int, *, acquire: bool, release: bool
    ) -> None:
        addresses, argument = self._resolve("atomic", pointers, mask, width)
        if argument is None:
            return
        if len(addresses) == 1:  # threads wait for each other only around a scalar atomic
            released = self._released.setdefault(int(addresses[0]), {})
            if acquire:
                _merge(self._acquired, released)
            if release:
                program, epoch = self._events[-1]
                _merge(released, self._acquired)
                _merge(released, {program: epoch - 1})
        self._require_order("does an atomic on", argument, addresses, atomic=True)
        _, atomics = self._touched[argument.storage]
        atomics[addresses - np.uint64(argument.storage)] = len(self._events)

    def _resolve(
        self, what: str, pointers: np.ndarray, mask: np.ndarray, width: int
    ) -> tuple[np.ndarray, Argument | None]:
        """The addresses that are not masked off, and the one tensor that all of them lie in."""
        active = np.broadcast_to(pointers, mask.shape)[mask] if not mask.all() else pointers.ravel()
        if active.size == 0:
            return active, None
        tags, addresses = active >> TAG, active & ADDRESS
        tag = int(tags[0])
        if not 1 <= tag <= len(self.arguments):
            raise OutOfBounds(
                f"{self._where()}: {what} at address {int(addresses[0]):#x}, which no argument points to"
            )
        argument = self.arguments[tag - 1]
        bad = (tags != tags[0]) | argument.outside(addresses, width)
        if bad.any():
            tensor = argument.tensor
            raise OutOfBounds(
                f"{self._where()}: {what} of {self._element(argument, addresses[bad])} is outside of it: shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()} ({bad.sum()} of {bad.size} lanes)"
            )
        return addresses, argument

    def _require_order(
        self, does: str, argument: Argument, addresses: np.ndarray, *, atomic: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Refuse what other programs did at these addresses in no order; returns the events found there."""
        if argument.storage not in self._touched:
            size = argument.tensor.untyped_storage().nbytes()
            self._touched[argument.storage] = (np.zeros(size, np.int32), np.zeros(size, np.int32))
        offsets = addresses - np.uint64(argument.storage)
        stored, atomics = (events[offsets] for events in self._touched[argument.storage])
        for events, what in ((stored, "stored to"), (atomics, "did an atomic on"))[: 1 if atomic else 2]:
            if not events.any():
                continue
            for event in np.unique(events[events != 0]):
                program, epoch = self._events[event - 1]
                if program == self.grid_index or self._acquired.get(program, -1) >= epoch:
                    continue
                element = self._element(argument, addresses[events == event])
                barred = program in self._acquired
                self._race(
                    f"{does} {element}, which program {program} {what}, in no order"
                    + (" (it had no tl.debug_barrier() before its atomic)" if barred else "")
                )
        return stored, atomics

    def _require_one_value_each(
        self, argument: Argument, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray
    ) -> None:
        """Lanes of one store may meet at an address only with one and the same value."""
        if addresses.size < 2 or (addresses[1:] > addresses[:-1]).all():
            return
        order = np.argsort(addresses, kind="stable")
        same = np.flatnonzero(addresses[order][1:] == addresses[order][:-1])
        bits = np.ascontiguousarray(np.broadcast_to(values, mask.shape)[mask]).view(f"u{values.itemsize}")[
            order
        ]
        differ = same[bits[same] != bits[same + 1]]
        if differ.size:
            self._race(f"stores two values to {self._element(argument, addresses[order][differ])} at once")

    def _race(self, text: str) -> None:
        raise Race(f"{self._where()} {text}")

    def _where(self) -> str:
        return f"{self.kernel}, program {self.grid_index}"

    def _element(self, argument: Argument, addresses: np.ndarray) -> str:
        return f"{argument.name}[{(int(addresses[0]) - argument.start) // argument.tensor.element_size()}]"


def _merge(into: dict[tuple[int, ...], int], other: dict[tuple[int, ...], int]) -> None:
    for program, epoch in other.items():
        into[program] = max(epoch, into.get(program, -1))
