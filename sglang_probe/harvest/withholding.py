"""Withholding at the end of `sglang-probe harvest`, by the one who holds the run directory."""

from __future__ import annotations

from pathlib import Path

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.directory import hold_directory
from sglang_probe.privacy.rule import Withhold
from sglang_probe.privacy.withhold import settle_in_place, withhold_in_place
from sglang_probe.run.run import Run, load_run


def settle_withheld(path: Path) -> None:
    """Finish what a command left half done that was killed while it withheld: nothing that holds personal data stays
    beside a run from which it was taken out.

    Raises:
        RunDirectoryError: another process records there.
    """
    if path.parent.is_dir():
        with hold_directory(path):
            settle_in_place(path)


def withhold_recorded(run: Run, model: Path, rule: Withhold) -> Run:
    """Put a copy without what is personal in the place of a run. Arguments as of `withhold_in_place`.

    Raises:
        RunDirectoryError: another process records there.
        ConfigError: the run is not complete; or as `withhold`.
    """
    with hold_directory(run.path):
        run = load_run(run.path)
        if not run.complete:
            raise ConfigError(
                f"{run.path} is not complete, and holds what `withhold` takes out", fix="finish it with --resume"
            )
        return withhold_in_place(run, model, rule)
