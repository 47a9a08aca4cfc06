"""A folder of vectors is read whole or refused with a sentence, and nothing but its names can be asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_probe.errors import ConfigError
from sglang_probe.run import journal
from sglang_probe.steering.library import Library, check_vector, write

WEIGHTS = "a" * 64
D = 4
FEATURE = {
    "vector": torch.eye(D)[0] * 2,
    "encoder": torch.ones(D),
    "encoder_bias": torch.tensor(-0.5),
    "threshold": torch.tensor(0.25),
}


def add(folder: Path, name: str, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> Any:
    told: dict[str, Any] = {
        "name": name,
        "kind": "direction",
        "hook_point": "blocks.1.hook_resid_post",
        "model": "tiny",
        "model_weight_hash": WEIGHTS,
        "made_by": {"command": "test"},
        **fields,
    }
    return write(folder, {"vector": torch.arange(1.0, D + 1)} if tensors is None else tensors, **told)


def test_what_was_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    written = [
        add(tmp_path, "formal", layer_mean_norm=7.5, evidence={"auc": {"estimate": 0.9}}),
        add(tmp_path, "f12", FEATURE, kind="feature", percentile99=3.0),
        add(tmp_path, "gate", {"vector": torch.ones(D), "threshold": torch.tensor(0.1)}, kind="probe"),
    ]
    library = Library.open(tmp_path)
    assert list(library) == ["f12", "formal", "gate"]
    for vector in written:
        found = library[vector.name]
        assert found.card == vector.card
        assert found.hash == vector.hash
        assert found.tensors.keys() == vector.tensors.keys()
        assert all(torch.equal(found.tensors[k], t) for k, t in vector.tensors.items())
    assert library["formal"].card.norm == pytest.approx(30**0.5)
    assert library["f12"].scalar("threshold") == 0.25


def test_the_hash_is_of_tensors_and_card(tmp_path: Path) -> None:
    hashes = {
        add(tmp_path / "a", "v").hash,
        add(tmp_path / "b", "v", {"vector": torch.arange(1.0, D + 1) * (1 + 1e-6)}).hash,
        add(tmp_path / "c", "v", hook_point="blocks.2.hook_resid_post").hash,
        add(tmp_path / "d", "w").hash,
    }
    assert len(hashes) == 4
    assert add(tmp_path / "e", "v").hash in hashes
    assert Library.open(tmp_path / "a").hash == Library.open(tmp_path / "e").hash
    assert Library.open(tmp_path / "a").hash != Library.open(tmp_path / "d").hash


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        card = json.loads((folder / "v.json").read_text())
        change(card)
        (folder / "v.json").write_text(json.dumps(card))

    return damage


def _retensor(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Other tensors, under a card that names their hash: what a careless tool leaves."""

    def damage(folder: Path) -> None:
        save_file(tensors, folder / "v.safetensors")
        _edit(lambda c: c.update(sha256=journal.sha256(folder / "v.safetensors")))(folder)

    return damage


def _flip(folder: Path) -> None:
    data = bytearray((folder / "v.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "v.safetensors").write_bytes(data)


GOOD = torch.arange(1.0, D + 1)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the tensors": (_flip, r"v\.safetensors was changed after its card was written"),
    "the tensors are cut": (lambda f: os.truncate(f / "v.safetensors", 10), "was changed after"),
    "no tensors": (lambda f: (f / "v.safetensors").unlink(), r"v\.json is there without v\.safetensors"),
    "no card": (lambda f: (f / "v.json").unlink(), r"v\.safetensors is there without v\.json"),
    "tensors are a folder": (
        lambda f: ((f / "v.safetensors").unlink(), (f / "v.safetensors").mkdir()),
        "cannot be read",
    ),
    "card is no JSON": (lambda f: (f / "v.json").write_text("{"), r"v\.json is no card"),
    "card is a list": (lambda f: (f / "v.json").write_text("[]"), "it holds no mapping"),
    "card is bytes": (lambda f: (f / "v.json").write_bytes(b"\xff\xfe"), r"v\.json is no card"),
    "card is huge": (lambda f: (f / "v.json").write_text(" " * (1 << 21)), "it is longer than"),
    "of another name": (_edit(lambda c: c.update(name="w")), "is the card of `w`"),
    "unknown key": (_edit(lambda c: c.update(strenght=1)), r"v\.json: unknown key `strenght`"),
    "no hook point": (_edit(lambda c: c.pop("hook_point")), "`hook_point` is required"),
    "a hook point of attention": (
        _edit(lambda c: c.update(hook_point="blocks.0.attn.hook_q")),
        "is not in the residual stream",
    ),
    "no number": (_edit(lambda c: c.update(norm=float("nan"))), "`norm`"),
    "another norm": (_edit(lambda c: c.update(norm=c["norm"] * 1.001)), "the norm is"),
    "another width": (_edit(lambda c: c.update(width=D + 1)), r"not float32 \[5\]"),
    "no hash": (_edit(lambda c: c.update(sha256="abc")), "no SHA-256"),
    "another kind": (_edit(lambda c: c.update(kind="feature")), "a feature has a tensor `encoder`"),
    "a tensor more": (_retensor(vector=GOOD, code=GOOD.clone()), "a direction has no tensor `code`"),
    "half precision": (_retensor(vector=GOOD.half()), "is torch.float16"),
    "not finite": (_retensor(vector=GOOD / 0), "is not finite"),
    "a matrix": (_retensor(vector=GOOD[None]), r"\[1, 4\], not float32 \[4\]"),
    "a name with a space": (
        lambda f: [(f / f"v{s}").rename(f / f"v v{s}") for s in (".json", ".safetensors")],
        "`v v` is no name",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_met_with_a_sentence(damage: str, tmp_path: Path) -> None:
    add(tmp_path, "v")
    add(tmp_path, "whole")
    Library.open(tmp_path)
    do, says = DAMAGE[damage]
    do(tmp_path)
    with pytest.raises(ConfigError, match=says) as e:
        Library.open(tmp_path)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("name", ["../v", "a/b", ".v", "", "v\n", "ü", "x" * 101, "v.json"])
def test_a_name_is_never_a_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no name of a vector"):
        add(tmp_path / "library", name)
    assert not (tmp_path / "library").exists()


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    add(tmp_path, "formal")
    library = Library.open(tmp_path)
    with pytest.raises(ConfigError, match=r"no vector `fromal` in the library; did you mean `formal`\?"):
        library["fromal"]
    outside = tmp_path.parent / "outside"
    add(outside, "elsewhere")
    with pytest.raises(ConfigError, match="no vector"):
        library["../outside/elsewhere"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"width": D + 4}, "has 4 numbers, and the residual stream of this model 8"),
        ({"layers": 1}, "this model has 1 layers"),
        ({"weight_hash": "b" * 64}, "was made from weights aaaaaaaaaaaa of `tiny`, and this model has weights bbbbbb"),
        ({"weight_hash": None}, "those of this model are unknown"),
    ],
)
def test_a_vector_of_another_model_is_refused(model: dict[str, Any], says: str, tmp_path: Path) -> None:
    vector = add(tmp_path, "v")
    fits: dict[str, Any] = {"width": D, "layers": 2, "weight_hash": WEIGHTS}
    check_vector(vector, **fits)
    Library.open(tmp_path).check(**fits)
    with pytest.raises(ConfigError, match=says):
        check_vector(vector, **{**fits, **model})
    with pytest.raises(ConfigError, match="`v`"):
        Library.open(tmp_path).check(**{**fits, **model})


def test_a_vector_that_does_not_say_whose_it_is_is_refused(tmp_path: Path) -> None:
    vector = add(tmp_path, "v", model_weight_hash=None)
    with pytest.raises(ConfigError, match="does not say from whose weights"):
        check_vector(vector, width=D, layers=2, weight_hash=WEIGHTS)


def test_nothing_is_replaced_unless_asked(tmp_path: Path) -> None:
    before = add(tmp_path, "v")
    with pytest.raises(ConfigError, match="has a vector `v` already"):
        add(tmp_path, "v", {"vector": torch.ones(D)})
    assert Library.open(tmp_path)["v"].hash == before.hash
    after = add(tmp_path, "v", {"vector": torch.ones(D)}, overwrite=True)
    assert Library.open(tmp_path)["v"].hash == after.hash != before.hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.json", "v.safetensors"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_write_that_fails_leaves_nothing_that_is_taken_for_a_vector(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, "v")
    calls = 0

    def replace(*_args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError("no space left")
        os_replace(*_args)

    os_replace = os.replace
    monkeypatch.setattr(journal.os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        add(tmp_path, "v", {"vector": torch.ones(D)}, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="half of a vector"):
        Library.open(tmp_path)
    add(tmp_path, "v", {"vector": torch.ones(D)}, overwrite=True)
    assert load_file(tmp_path / "v.safetensors")["vector"].equal(Library.open(tmp_path)["v"].vector)


@pytest.mark.parametrize("vector", [torch.zeros(D), torch.full((D,), torch.inf), torch.ones(2, 2)])
def test_what_is_no_direction_is_not_written(vector: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero or not finite|list of numbers"):
        add(tmp_path / "library", "v", {"vector": vector})
    assert not (tmp_path / "library").exists()


def test_no_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Library.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        Library.open(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert len(Library.open(tmp_path)) == 0
