"""The folder that an export makes: a new one, complete or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_probe.errors import ConfigError


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes its name once everything is in it.

    Raises:
        ConfigError: there is something of that name, and `overwrite` was not said or it is no export.
    """
    marker = ".sglang-probe-export"
    folder = folder.resolve()
    if folder.exists():
        if not (folder / marker).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there, and is no export", fix="give another --output")
        if not overwrite and any(folder.iterdir()):
            raise ConfigError(f"{folder} is there already", fix="give --overwrite, or another --output")
    made = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        (made / marker).touch()
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def model_name(model: str) -> str:
    """Name of a model as one part of a path: of a folder, or of `organisation/model`, the last part. Where the model
    lies is nobody's business."""
    return Path(model).name or "model"
