"""Pieces of a study computed side by side, one a process.

Processes and not threads: a piece is hundreds of small products and data frames, between which a thread needs Python's
lock. Each process has one piece in memory at a time and computes on one thread.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from sglang_probe.errors import ProbeError

P = TypeVar("P")
R = TypeVar("R")

Work = Callable[[P, Callable[[], None]], R]
"""Computes a piece; calls its second argument after each document. Pickled, so a function of a module or an
object with `__call__`."""

_LOOK_SECONDS = 0.5
_FEWEST = 2
"""Pieces a process that make up for its start, which is two seconds of CPU."""


def side_by_side(pieces: int, asked: int | None = None) -> int:
    """How many processes to use for so many pieces: as many as were asked for, else as there are CPUs for this process.

    With 1 nothing is started.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(asked or cpus, pieces // _FEWEST if asked is None else pieces))


def compute(
    pieces: Sequence[P], work: Work[P, R], *, processes: int, advance: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[P, R]]:
    """Every piece with what `work` makes of it, in the order in which they are finished.

    Args:
        advance: told, from time to time, how many documents are done in all.

    Raises:
        ProbeError: a process ended, most likely for want of memory; or what `work` raises.
    """
    if processes <= 1:
        done = _Count(advance)
        for piece in pieces:
            yield piece, work(piece, done)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads of its own may hang
    count = context.Value("q", 0)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(count,))
    try:
        waiting: dict[Future[R], P] = {pool.submit(_do, work, piece): piece for piece in pieces}
        while waiting:
            finished, _ = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            advance(count.value)
            for future in finished:
                piece = waiting.pop(future)
                yield piece, future.result()
    except BrokenProcessPool as e:
        raise ProbeError(
            "a process that computes this study ended; most likely the machine ran out of memory",
            fix="`--processes 1` needs least; --resume keeps what is finished",
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


class _Count:
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._done, self._advance = 0, advance

    def __call__(self) -> None:
        self._done += 1
        self._advance(self._done)


_count: Any = None
"""Documents that are done, in memory that the processes share."""


def _begin(count: Any) -> None:
    global _count
    import torch

    torch.set_num_threads(1)
    _count = count


def _do(work: Work[P, R], piece: P) -> R:
    return work(piece, _advance)


def _advance() -> None:
    with _count.get_lock():
        _count.value += 1
