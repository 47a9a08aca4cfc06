"""Progress on the terminal. `Quiet` does nothing, so that callers never branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """What a harvest tells of its progress."""

    @contextmanager
    def stage(self, what: str) -> Iterator[None]: ...

    @contextmanager
    def requests(self, what: str, total: int) -> Iterator[Counter]: ...


class Counter(Protocol):
    def advance(self, tokens: int) -> None: ...


class Quiet:
    """No output."""

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        yield

    @contextmanager
    def requests(self, what: str, total: int) -> Iterator[Counter]:
        yield self

    def advance(self, tokens: int) -> None:
        pass


class Terminal:
    """A spinner for stages, a bar with counts and tokens per second for requests."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self._console
        ) as progress:
            task = progress.add_task(what, total=None)
            yield
            progress.update(task, total=1, completed=1)

    @contextmanager
    def requests(self, what: str, total: int) -> Iterator[Counter]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            yield _Bar(progress, what, total)


class _Bar:
    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress = progress
        self._tokens = 0
        self._task = progress.add_task(what, total=total, rate="")

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        elapsed = self._progress.tasks[self._task].elapsed or 0
        rate = f"{self._tokens / elapsed:,.0f} tok/s" if elapsed > 0 else ""
        self._progress.update(self._task, advance=1, rate=rate)
