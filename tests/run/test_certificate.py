"""Certificates: what covers what, and that neither a failed nor a changed one counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.run import certificate
from sglang_probe.run.certificate import find, kinds_of, misses, read_certificate, sealed, write_certificate

SUBJECT = {"sglang": "0.5.23", "inventory": "aa", "device": "NVIDIA H100", "model": {"config_sha256": "bb"}}
KINDS = kinds_of(["hook_embed", "blocks.3.hook_resid_post"])


def made(**fields: Any) -> dict[str, Any]:
    return sealed(
        {"schema": certificate.SCHEMA, "passed": True, "subject": SUBJECT, "kinds": KINDS, "checks": [], **fields}
    )


def test_a_certificate_covers_every_layer_of_its_kinds_and_no_other_kind() -> None:
    assert misses(made(), SUBJECT, kinds_of(["blocks.0.hook_resid_post", "blocks.{4..8}.hook_resid_post"])) is None
    assert "attn.hook_v" in str(misses(made(), SUBJECT, kinds_of(["blocks.0.attn.hook_v"])))


@pytest.mark.parametrize(
    ("field", "value"),
    [("sglang", "0.5.24"), ("inventory", "cc"), ("device", "NVIDIA H200"), ("model", {"config_sha256": "dd"})],
)
def test_another_subject_is_named(field: str, value: Any) -> None:
    said = misses(made(), {**SUBJECT, field: value}, KINDS)
    assert said is not None
    assert said.startswith(f"it is of {field} ")


def test_what_is_not_known_yet_is_not_asked() -> None:
    assert misses(made(), {"sglang": "0.5.23"}) is None


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write_certificate(tmp_path / "c.json", made())
    assert read_certificate(tmp_path / "c.json") == made()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c | {"passed": False}, "was changed"),
        (lambda c: sealed(c | {"passed": False, "checks": [{"name": "owners", "violation": "3 wrong"}]}), "3 wrong"),
        (lambda c: c | {"subject": {**SUBJECT, "device": "another"}}, "was changed"),
        (lambda c: sealed(c | {"schema": 99}), "no certificate of this version"),
    ],
    ids=["changed", "failed", "moved to another device", "of another schema"],
)
def test_what_is_no_proof_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(change(made())))
    with pytest.raises(ConfigError, match=said):
        read_certificate(tmp_path / "c.json")


def test_no_file_is_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sglang-probe prove"):
        read_certificate(tmp_path / "none.json")


def test_the_newest_that_covers_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PROBE_CACHE", str(tmp_path))
    assert find(SUBJECT, KINDS) == (None, "there is none on this machine")
    folder = tmp_path / certificate.FOLDER
    for age, (name, fields) in enumerate(
        {
            "failed": {"passed": False, "checks": [{"name": "owners", "violation": "3 wrong"}]},
            "other": {"subject": {**SUBJECT, "sglang": "0.5.17"}},
            "right": {},
            "older": {"time": "before"},
        }.items()
    ):
        write_certificate(folder / f"{name}.json", made(**fields))
        os.utime(folder / f"{name}.json", (1e9 - age, 1e9 - age))
    assert find(SUBJECT, KINDS)[0] == folder / "right.json"
    path, why = find({**SUBJECT, "device": "none"}, KINDS)
    assert path is None
    assert "failed.json" in why
    assert "3 wrong" in why


def test_a_later_proof_of_the_same_takes_the_place_of_an_earlier_one() -> None:
    assert certificate.default_path(SUBJECT) == certificate.default_path({**SUBJECT, "torch": "2.12"})
    assert certificate.default_path(SUBJECT) != certificate.default_path({**SUBJECT, "device": "NVIDIA H200"})
