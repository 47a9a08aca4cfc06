"""Certificates: what `sglang-probe prove` found on one machine, and whether that covers what is to be recorded.

A certificate is a JSON file. Its `subject` says what was proved: release and inventory of SGLang, device, model, dtype,
attention backend, graphs or not; `kinds` which kinds of hook points. Its own `sha256` is over everything else in it, so
that manifests can cite it and an edited one is noticed. It is no signature: who can write the file can write the hash.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.paths import cache_dir
from sglang_probe.run.hook_points import parse_pattern

SCHEMA = 1
FOLDER = "certificates"
"""In the cache folder: where `prove` writes and `auto` looks."""
KEPT_SETS = "kept sets"
"""Among the kinds of hook points: requests may name kept sets. `prove --kept-sets` proves it."""

_IN_THE_NAME = (
    *("sglang", "inventory", "device", "config_sha256", "dtype", "attention_backend", "tp_size"),
    *("graphs", "prefill_graphs"),
)


def digest(value: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def kinds_of(hook_points: Iterable[str]) -> list[str]:
    """Kinds of hook points, e.g. `hook_resid_post` of `blocks.3.hook_resid_post`; a kind is right in every layer or in
    none, because one function writes them all."""
    return sorted({parse_pattern(name).site for name in hook_points})


def versions() -> dict[str, Any]:
    """Versions that a certificate is of, beside SGLang's."""
    return {"sglang_probe": _version("sglang-probe"), "torch": _version("torch")}


def model_facts(folder: Path | None) -> dict[str, Any]:
    """What tells one model from another without reading its weights: the hash of its configuration, and the sizes of
    its files of weights. A model whose folder is not known is covered by no certificate."""
    if folder is None:
        return {"config_sha256": "unknown"}
    files = sorted(p for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern))
    digest_of_file = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {"config_sha256": digest_of_file, "weights_bytes": {p.name: p.stat().st_size for p in files}}


def command(model: str, server: Mapping[str, Any], *, kept_sets: bool = False) -> str:
    """The command that proves a configuration; a `dtype` among the arguments becomes its option."""
    server = {k: v for k, v in server.items() if v is not None}
    dtype = server.pop("dtype", None)
    words = ["sglang-probe", "prove", "--model", model, *(["--dtype", str(dtype)] if dtype else [])]
    words += ["--kept-sets"] if kept_sets else []
    return shlex.join([*words, *(["--server", json.dumps(server)] if server else [])])


def sealed(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """With its own hash."""
    rest = {k: v for k, v in certificate.items() if k != "sha256"}
    return {**rest, "sha256": digest(rest)}


def default_path(subject: Mapping[str, Any]) -> Path:
    """Where the certificate of a subject lies: a later proof of the same takes the place of an earlier one."""
    key = digest({name: subject.get(name) for name in _IN_THE_NAME})[:16]
    return cache_dir() / FOLDER / f"{subject['sglang']}-{key}.json"


def write_certificate(path: Path, certificate: Mapping[str, Any]) -> None:
    """Replace `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    half.replace(path)


def read_certificate(path: Path) -> dict[str, Any]:
    """Read a certificate.

    Raises:
        ConfigError: there is none, it is none, it was changed, or the proof failed.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"certificate {path} cannot be read: {e}", fix="run `sglang-probe prove`") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("subject"), dict):
        raise ConfigError(f"{path} is no certificate of this version", fix="run `sglang-probe prove`")
    if sealed(found)["sha256"] != found.get("sha256"):
        raise ConfigError(f"certificate {path} was changed: its hash is another", fix="run `sglang-probe prove` again")
    if found.get("passed") is not True:
        first: dict[str, Any] = next((c for c in found.get("checks", ()) if c.get("violation")), {})
        why = f"{first.get('name')}: {first.get('violation')}" if first else "no check says why"
        raise ConfigError(f"the proof of {path} failed: {why}", fix="report it; record the ledger alone meanwhile")
    return found


def misses(certificate: Mapping[str, Any], subject: Mapping[str, Any], kinds: Collection[str] = ()) -> str | None:
    """What of `subject`, as far as it is known, a certificate is not of; None: it covers it.

    Args:
        subject: what is to be recorded; what is not in it is not asked.
        kinds: kinds of hook points that are to be captured.
    """
    proved = certificate["subject"]
    for name, value in subject.items():
        if proved.get(name) != value:
            return f"it is of {name} {_short(proved.get(name))}, and this is {_short(value)}"
    missing = sorted(set(kinds) - set(certificate.get("kinds", ())))
    if KEPT_SETS in missing:
        return "it is not of kept sets"
    if missing:
        return f"it is not of rows of {', '.join(missing)}"
    return None


def find(subject: Mapping[str, Any], kinds: Collection[str] = ()) -> tuple[Path | None, str]:
    """The newest certificate of this machine that covers a subject, or why there is none."""
    why = "there is none on this machine"
    candidates = sorted((cache_dir() / FOLDER).glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in candidates:
        try:
            missed = misses(read_certificate(path), subject, kinds)
        except ConfigError as e:
            missed = e.message
        if missed is None:
            return path, ""
        why = f"the newest that was tried, {path.name}: {missed}" if path == candidates[0] else why
    return None, why


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
