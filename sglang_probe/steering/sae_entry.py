"""A library's entry of kind `sae`: a card alone, which names a folder of an SAE and the hashes of its files.

The folder lies inside the library or beside it, so that both can be moved together; its files are checked against the
card whenever the library is read. Nothing else of a library names a path.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sglang_probe.errors import ConfigError
from sglang_probe.run import journal
from sglang_probe.sae.folder import CONFIG, GEMMA_SCOPE, WEIGHTS, read_sae

if TYPE_CHECKING:
    from sglang_probe.sae.sae import SAE
    from sglang_probe.steering.card import Card

_FIX = "restore the folder from a copy, or make the entry again (`sglang-probe vector make sae`)"


def place(library: Path, sae: Path, name: str, *, overwrite: bool = False) -> str:
    """Name of an SAE's folder as the card of entry `name` has it, relative to the library.

    A folder inside the library or beside it stays where it is; another is copied into the library.

    Args:
        overwrite: whether the copy may take the place of another SAE.

    Raises:
        ConfigError: the copy would take the place of something else.
    """
    root, at = library.resolve(), sae.resolve()
    if at != root and at != root.parent and at.is_relative_to(root.parent):
        # The parent is there for siblings, not for whatever lies under it elsewhere.
        return str(PurePosixPath(*([".."] if not at.is_relative_to(root) else []), *_below(root, at)))
    target = library / name
    if overwrite and target.is_dir() and _is_own(library, name):
        shutil.rmtree(target)
    if target.exists():
        raise ConfigError(f"{target} is there already, where the SAE would be copied to", fix="choose another name")
    target.mkdir(parents=True)
    for file in files(sae):
        shutil.copyfile(sae / file, target / file)
    return name


def _is_own(library: Path, name: str) -> bool:
    """Whether the folder of this name was copied for the entry of this name, and no other entry reads it."""
    target = library / name
    if not {f.name for f in target.iterdir()} <= {CONFIG, WEIGHTS, *GEMMA_SCOPE}:
        return False
    readers = set()
    for card in library.glob("*.json"):
        with suppress(OSError, ValueError):
            told = json.loads(card.read_text("utf-8")).get("sae")
            if told and (library / told["folder"]).resolve() == target.resolve():
                readers.add(card.stem)
    return readers <= {name}


def files(sae: Path) -> dict[str, str]:
    """SHA-256 of each file of an SAE that is read.

    Raises:
        ConfigError: the folder holds no SAE.
    """
    names = [n for n in (CONFIG, WEIGHTS) if (sae / n).is_file()] if (sae / CONFIG).is_file() else []
    names = names or [n for n in GEMMA_SCOPE if (sae / n).is_file()][:1]
    if not names:
        raise ConfigError(f"{sae} holds no SAE", fix="give the folder that SAELens or `sglang-probe sae train` wrote")
    return {n: journal.sha256(sae / n) for n in names}


def read(library: Path, card: Card) -> SAE:
    """The SAE that a card names, if it is the same as when the card was written.

    Raises:
        ConfigError: the folder is elsewhere, lacks a file, or was changed; or the SAE is of another width or place.
    """
    assert card.sae is not None
    where = f"{library / (card.name + '.json')}"
    root = library.resolve()
    folder = (library / card.sae.folder).resolve()
    if not folder.is_relative_to(root.parent) or folder in (root, root.parent):
        raise ConfigError(
            f"{where} names the folder `{card.sae.folder}`, which is neither in the library nor beside it"
        )
    if not folder.is_dir():
        raise ConfigError(f"{where} names the folder `{card.sae.folder}`, which is not there", fix=_FIX)
    for name, digest in card.sae.files.items():
        file = folder / name
        if not file.is_file() or journal.sha256(file) != digest:
            raise ConfigError(f"{file} was changed or is gone since the card of `{card.name}` was written", fix=_FIX)
    sae = read_sae(folder, hook_point=card.hook_point)
    if sae.width != card.width:
        raise ConfigError(f"{where}: the SAE has a width of {sae.width}, and the card says {card.width}", fix=_FIX)
    return sae


def _below(root: Path, at: Path) -> tuple[str, ...]:
    return at.relative_to(root if at.is_relative_to(root) else root.parent).parts
