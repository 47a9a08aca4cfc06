"""`sglang-probe upload` and `sglang-probe download`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.remote.process import Uploading


def upload(
    run: Annotated[Path, typer.Argument(help="Run directory, or the folder of a live recording.")],
    to: Annotated[str, typer.Argument(help="URL of a folder: `s3://bucket/path`, `gs://...`, `file:///...`.")],
    overwrite: Annotated[bool, typer.Option(help="If another run is there, delete it first.")] = False,
    patience: Annotated[float, typer.Option(help="Give up after so many seconds without progress.")] = 300.0,
) -> None:
    """Copy a run to an object store or another file system, or finish such a copy.

    What is there already is not copied again. A file gets its name once all of it has arrived, and the manifest comes
    last: a copy whose manifest says that the run is closed is whole. Install the driver of the store (`s3fs`,
    `gcsfs`, ...) first; it finds its credentials itself. `sglang-probe download` fetches the copy and compares every
    file with its hash.

    To copy a run while it is recorded, put `upload: {to: URL}` into the YAML of the harvest, or below `live` in that of
    a server.

    Example: `sglang-probe upload runs/mine s3://bucket/runs/mine`
    """
    import threading

    from rich.console import Console

    from sglang_probe.errors import ProbeError
    from sglang_probe.remote.follow import Follower
    from sglang_probe.remote.process import hold_copy
    from sglang_probe.remote.target import Target
    from sglang_probe.run.files import no_run
    from sglang_probe.run.manifest import MANIFEST

    console = Console()
    single = (run / MANIFEST).exists()
    if not single and not any(run.glob(f"**/segment-*/{MANIFEST}")):
        raise no_run(run)
    target, ended = Target(to), threading.Event()
    ended.set()
    with hold_copy(run), _Bar(console) as bar:
        follower = Follower(
            run,
            target,
            single=single,
            overwrite=overwrite,
            patience=patience,
            tell=lambda s: bar(s.files, s.waiting, s.bytes, s.error),
        )
        state = follower.run(ended)
    if state.refused is not None or state.error is not None:
        raise ProbeError(
            f"not everything is at {target.url}: {state.refused or state.error}",
            fix=None if state.refused else "the same command goes on with it",
        )
    console.print(f"{target.url}: {state.files} files copied", end="", markup=False, highlight=False, soft_wrap=True)
    console.print("" if state.done else "; the run is not closed, so that more may come", soft_wrap=True)


def download(
    source: Annotated[str, typer.Argument(help="URL that a run or a live recording was uploaded to.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
) -> None:
    """Fetch a run from an object store or another file system; every file is compared with its hash.

    The folder appears once everything is there. After a failure the same command goes on with what was fetched. A copy
    of a run that was not closed is like a run whose engine was killed: `harvest --resume` finishes it.

    Example: `sglang-probe download s3://bucket/runs/mine runs/mine`
    """
    from rich.console import Console

    from sglang_probe.remote.download import download as fetch
    from sglang_probe.remote.target import Target

    console = Console()
    with _Bar(console) as bar:
        found = fetch(Target(source), folder, moved=lambda _name, done, of: bar(done, of - done, 0))
    for within, status in found.items():
        console.print(f"{folder / within}: {status}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"check it: sglang-probe verify {folder}", markup=False, highlight=False, soft_wrap=True)


def finish(uploading: Uploading, console: Console, run: Path, to: str) -> None:
    """Wait for the copy of a harvest, and say what came of it; a copy that lags is no failure of the harvest."""
    from sglang_probe.remote.target import shown

    to = shown(to)
    with _Bar(console) as bar:
        state: dict[str, Any] = uploading.finish(lambda s: bar(s["files"], s["waiting"], s["bytes"], s["error"]))
    if state["done"]:
        console.print(f"copied to {to}", markup=False, highlight=False, soft_wrap=True)
        return
    why = state["refused"] or state["error"] or "the run is not closed"
    console.print(f"not everything is at {to}: {why}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"  to finish the copy: sglang-probe upload {run} {to}", markup=False, highlight=False, soft_wrap=True
    )


class _Bar:
    """A bar of files; call it with how many are there, how many wait, bytes, and why it is tried again."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._progress.add_task("files", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, waiting: int, size: int, error: str | None = None) -> None:
        from rich.markup import escape

        told = f"files, {size / 1e6:,.0f} MB" if size else "files"
        if error is not None:
            told += f"; tried again: {escape(error)}"
        self._progress.update(self._task, completed=done, total=done + waiting, description=told)
