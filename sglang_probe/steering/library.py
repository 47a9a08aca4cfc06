"""A library of vectors: a folder from which requests name what is added, removed or measured, and nothing else.

Each vector is two files. `NAME.safetensors` holds its tensors, all float32:

    vector        [d]   a direction, the decoder row of a feature, or the weights of a probe
    encoder       [d]   feature: the column of the encoder
    encoder_bias  []    feature: its bias
    threshold     []    feature: pre-activations up to it count as zero; probe: a row fires above it
    decoder_bias  [d]   feature: what the SAE takes from a row before it encodes it; absent: nothing

An entry of kind `sae` has no file of tensors: its card names the folder of an SAE (`sae_entry.py`).

`NAME.json` is its card (`card.Card`): where it belongs, how it was made, what is known of its effect, and the SHA-256
of the tensors. A folder is read as a whole, when a server starts: a request can only name what is in memory then.
Clients never send tensors, paths or code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.config import nearest, parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.run import journal
from sglang_probe.run.lock import hold
from sglang_probe.sae.folder import CONFIG, read_sae
from sglang_probe.steering import sae_entry
from sglang_probe.steering.card import NAME, Card, residual_point, vector_name
from sglang_probe.steering.card import MadeBy as MadeBy  # whoever writes needs it

if TYPE_CHECKING:
    import torch

    from sglang_probe.sae.sae import SAE

VECTOR, ENCODER, ENCODER_BIAS = "vector", "encoder", "encoder_bias"
THRESHOLD, DECODER_BIAS = "threshold", "decoder_bias"
TENSORS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "direction": (frozenset({VECTOR}), frozenset()),
    "feature": (frozenset({VECTOR, ENCODER, ENCODER_BIAS, THRESHOLD}), frozenset({DECODER_BIAS})),
    "probe": (frozenset({VECTOR, THRESHOLD}), frozenset()),
}
"""By kind: the tensors that an entry has, and those that it may have."""

SUFFIXES = (".safetensors", ".json")
_SCALARS = {ENCODER_BIAS, THRESHOLD}
_MOST_CARD_BYTES = 1 << 20
_NORM_TOLERANCE = 1e-5
"""Relative: norms in cards are of float32 tensors, summed in float64."""


@dataclass(frozen=True)
class Vector:
    """One entry: its card and its tensors, float32 on the CPU."""

    card: Card
    tensors: Mapping[str, torch.Tensor]
    sae: SAE | None = None
    """Of an entry of kind `sae`, which has no tensors of its own."""

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def vector(self) -> torch.Tensor:
        """`[d]`."""
        return self.tensors[VECTOR]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that is known of it, the tensors included: the identity that ledgers and cache
        namespaces use."""
        return hashlib.sha256(_canonical(self.card).encode()).hexdigest()

    @property
    def threshold(self) -> float | None:
        """Of a probe: a row fires above it. Of a feature: pre-activations up to it count as zero. None: it has none."""
        return self.scalar(THRESHOLD) if THRESHOLD in self.tensors else None

    def scalar(self, name: str) -> float:
        """A tensor without dimensions, as a number."""
        return float(self.tensors[name])


class Library(Mapping[str, Vector]):
    """The vectors of one folder by name, all in memory, in the order of their names."""

    def __init__(self, folder: Path, vectors: Mapping[str, Vector]) -> None:
        self.folder = folder
        self._vectors = dict(sorted(vectors.items()))

    @classmethod
    def open(cls, folder: str | Path) -> Library:
        """Read every vector of a folder, and check it against its card.

        Raises:
            ConfigError: there is no such folder, or something in it is damaged; names the file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise ConfigError(
                f"library of vectors {folder} {what}", fix="`sglang-probe vector make --help` says how to make one"
            )
        names = _names(folder)
        return cls(folder, {name: _read(folder, name) for name in names})

    def __getitem__(self, name: str) -> Vector:
        """A vector by its name.

        Raises:
            ConfigError: there is none of that name; the nearest is named.
        """
        if name not in self._vectors:
            raise ConfigError(
                f"no vector `{name}` in the library{nearest(name, self._vectors, what='it has')}",
                fix="`GET /probe/vectors` or `sglang-probe vector list` lists them",
            )
        return self._vectors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the hashes of all vectors."""
        told = "".join(f"{v.name} {v.hash}\n" for v in self.values())
        return hashlib.sha256(told.encode()).hexdigest()

    def without_saes(self) -> Library:
        """The same entries and hashes without the weights of SAEs: for a process that reads cards alone."""
        return Library(self.folder, {name: replace(v, sae=None) for name, v in self._vectors.items()})

    def check(self, *, width: int, layers: int, weight_hash: str | None) -> None:
        """Refuse a library with a vector that the model at hand cannot use, before anything is served.

        Args:
            width: of the model's residual stream. layers: that it has. weight_hash: of its weights; None: unknown.

        Raises:
            ConfigError: as `check_vector`, of the first such vector.
        """
        for vector in self.values():
            check_vector(vector, width=width, layers=layers, weight_hash=weight_hash)


def check_vector(vector: Vector, *, width: int, layers: int, weight_hash: str | None) -> None:
    """Refuse a vector that was made for another model.

    Raises:
        ConfigError: another width, a layer that the model does not have, or other weights.
    """
    card = vector.card
    if card.width != width:
        raise ConfigError(
            f"vector `{card.name}` has {card.width} numbers, and the residual stream of this model {width}",
            fix=f"it was made for `{card.model}`: make one from rows of this model",
        )
    if card.layer >= layers:
        raise ConfigError(
            f"vector `{card.name}` is for `{card.hook_point}`, and this model has {layers} layers, numbered from 0",
            fix=f"it was made for `{card.model}`: make one from rows of this model",
        )
    if card.model_weight_hash is None:
        raise ConfigError(
            f"vector `{card.name}` does not say from whose weights it was made",
            fix="make it from a run whose model lies in a folder: its manifest has the hash of the weights",
        )
    if weight_hash is None:
        raise ConfigError(
            f"vector `{card.name}` was made from weights {card.model_weight_hash[:12]}, and those of this model are "
            "unknown",
            fix="serve the model from a folder with its weight files",
        )
    if card.model_weight_hash != weight_hash:
        raise ConfigError(
            f"vector `{card.name}` was made from weights {card.model_weight_hash[:12]} of `{card.model}`, and this "
            f"model has weights {weight_hash[:12]}",
            fix="serve the model that it was made from, or make it anew from rows of this one",
        )


def write(folder: str | Path, tensors: Mapping[str, torch.Tensor], *, overwrite: bool = False, **fields: Any) -> Vector:
    """Add an entry to a library, which is made if need be.

    The card comes last: an entry without one, whatever a crash leaves, is refused by whoever reads the folder.

    Args:
        tensors: as the head of this file says; made float32.
        overwrite: replace an entry of the same name.
        fields: of `Card`, without `width`, `norm` and `sha256`, which are those of the tensors.

    Raises:
        ConfigError: the entry is there already, a field is wrong, or the tensors are not those of its kind.
    """
    import torch
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    if VECTOR not in tensors or tensors[VECTOR].ndim != 1:
        raise ConfigError(f"`{VECTOR}` is not among the tensors, or is no list of numbers")
    data = save(dict(tensors))
    norm = _norm(tensors[VECTOR])
    if not (math.isfinite(norm) and norm > 0):
        raise ConfigError(f"vector `{fields.get('name')}` is zero or not finite: its norm is {norm}")
    told = {**fields, "width": tensors[VECTOR].shape[0], "norm": norm, "sha256": hashlib.sha256(data).hexdigest()}
    card = parse_config(told, Card, where="card")
    _check(card, tensors, where=f"vector `{card.name}`")
    files = [folder / f"{card.name}{suffix}" for suffix in SUFFIXES]
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"library of vectors {folder} is a file, not a folder", fix="give a folder")
    folder.mkdir(parents=True, exist_ok=True)

    def write_tensors(path: Path) -> None:
        path.write_bytes(data)

    with hold(folder / ".lock", f"another process writes into {folder}", fix="try again once it is done", wait=10):
        if not overwrite and any(f.exists() for f in files):
            raise _taken(folder, card.name)
        files[1].unlink(missing_ok=True)
        journal.sync_folder(folder)
        journal.write_durably(files[0], write_tensors)
        journal.write_text_durably(files[1], json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
    return Vector(card, tensors)


def write_sae_entry(folder: str | Path, sae: Path, *, overwrite: bool = False, **fields: Any) -> Vector:
    """Add an entry of kind `sae` to a library, which is made if need be. The SAE stays where it is if that is inside
    the library or beside it, and is copied into the library else.

    Args:
        fields: of `Card`, without `kind`, `width`, `sae` and `sha256`, which are those of the SAE.

    Raises:
        ConfigError: the entry is there already, a field is wrong, or the folder holds no SAE that can be read.
    """
    folder, name = Path(folder), str(fields["name"])
    width = read_sae(sae, hook_point=fields["hook_point"]).width
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"library of vectors {folder} is a file, not a folder", fix="give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, card_file = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    with hold(folder / ".lock", f"another process writes into {folder}", fix="try again once it is done", wait=10):
        if not overwrite and any(f.exists() for f in (tensors, card_file)):
            raise _taken(folder, name)
        digests = sae_entry.files(sae)
        weights = next(d for n, d in digests.items() if n != CONFIG)
        place = {"folder": sae_entry.place(folder, sae, name, overwrite=overwrite), "files": digests}
        told = {**fields, "kind": "sae", "width": width, "sae": place, "sha256": weights}
        card = parse_config(told, Card, where="card")
        card_file.unlink(missing_ok=True)
        tensors.unlink(missing_ok=True)
        journal.write_text_durably(card_file, json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
        return _read(folder, name)


def refuse_soon(folder: str | Path, name: str, hook_point: str | None, *, overwrite: bool) -> None:
    """Refuse what `write` would refuse whatever the tensors are, before they are made.

    Raises:
        ConfigError: the name is none, it is taken, or the hook point is not in the residual stream.
    """
    try:
        vector_name(name)
        if hook_point is not None:
            residual_point(hook_point)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    if not overwrite and any((Path(folder) / f"{name}{suffix}").exists() for suffix in SUFFIXES):
        raise _taken(Path(folder), name)


def listed(library: Library) -> list[dict[str, Any]]:
    """Every card with the hash of its entry, as plain data: what clients may know of a library."""
    return [{**v.card.model_dump(mode="json"), "hash": v.hash} for v in library.values()]


def _taken(folder: Path, name: str) -> ConfigError:
    return ConfigError(f"{folder} has a vector `{name}` already", fix="choose another name, or give `--overwrite`")


def _names(folder: Path) -> list[str]:
    """Names of the entries of a folder. Other files, hidden ones and folders are none of the library's business."""
    cards, tensors = (
        {p.name.removesuffix(s) for p in folder.glob(f"*{s}") if not p.name.startswith(".")}
        for s in (".json", ".safetensors")
    )
    lone = sorted(tensors - cards) or sorted(n for n in cards - tensors if not _is_sae(folder / f"{n}.json"))
    if lone:
        name = lone[0]
        has, lacks = (".json", ".safetensors") if name in cards else (".safetensors", ".json")
        raise ConfigError(
            f"{folder / (name + has)} is there without {name}{lacks}: half of a vector, left by an interrupted write",
            fix="delete it, or make the vector again",
        )
    for name in sorted(cards):
        if not NAME.fullmatch(name):
            raise ConfigError(f"{folder / (name + '.json')}: `{name}` is no name of a vector", fix="rename both files")
    return sorted(cards)


def _read(folder: Path, name: str) -> Vector:
    from safetensors.torch import load

    file, path = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        if file.stat().st_size > _MOST_CARD_BYTES:
            raise ValueError(f"it is longer than {_MOST_CARD_BYTES:,} bytes")
        told = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} is no card of a vector: {e}", fix=_RESTORE) from e
    card = parse_config(told, Card, where=str(file))
    if card.name != name:
        raise ConfigError(f"{file} is the card of `{card.name}`", fix="give both files the name that the card has")
    if card.kind == "sae":
        return Vector(card, {}, sae_entry.read(folder, card))
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", fix=_RESTORE) from e
    if hashlib.sha256(data).hexdigest() != card.sha256:
        raise ConfigError(f"{path} was changed after its card was written", fix=_RESTORE)
    try:
        tensors = load(data)
    except Exception as e:  # safetensors' own error has no public base
        raise ConfigError(f"{path} holds no tensors: {e}", fix=_RESTORE) from e
    _check(card, tensors, where=str(path))
    return Vector(card, tensors)


def _is_sae(card: Path) -> bool:
    """Whether a card is of an entry that needs no file of tensors; what cannot be read is not."""
    try:
        told = json.loads(card.read_text(encoding="utf-8")) if card.stat().st_size <= _MOST_CARD_BYTES else None
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("kind") == "sae"


_RESTORE = "restore both files from a copy, or make the vector again"


def _check(card: Card, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Refuse tensors that are not those of the card."""
    import torch

    needed, allowed = TENSORS[card.kind]
    if missing := sorted(needed - tensors.keys()):
        raise ConfigError(f"{where}: a {card.kind} has a tensor `{missing[0]}`, and this one does not", fix=_RESTORE)
    if more := sorted(tensors.keys() - needed - allowed):
        raise ConfigError(f"{where}: a {card.kind} has no tensor `{more[0]}`", fix=_RESTORE)
    for name, t in sorted(tensors.items()):
        shape = [] if name in _SCALARS else [card.width]
        if list(t.shape) != shape or t.dtype != torch.float32:
            raise ConfigError(f"{where}: `{name}` is {t.dtype} {list(t.shape)}, not float32 {shape}", fix=_RESTORE)
        if not bool(t.isfinite().all()):
            raise ConfigError(f"{where}: `{name}` is not finite", fix=_RESTORE)
    norm = _norm(tensors[VECTOR])
    assert card.norm is not None  # `Card`
    if abs(norm - card.norm) > _NORM_TOLERANCE * card.norm:
        raise ConfigError(f"{where}: the norm is {norm:.6g}, and the card says {card.norm:.6g}", fix=_RESTORE)


def _norm(vector: torch.Tensor) -> float:
    return float(vector.double().norm())


def _canonical(card: Card) -> str:
    return json.dumps(card.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
