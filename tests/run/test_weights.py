"""One hash of a model's weights."""

from __future__ import annotations

from pathlib import Path

from sglang_probe.run import journal
from sglang_probe.run.weights import weight_hash, weight_hash_of_folder


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    one, two, three = (tmp_path / n for n in ("one", "two", "three"))
    for folder, name, data in ((one, "a", b"x"), (two, "b", b"x"), (three, "a", b"y")):
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(data)
    assert weight_hash_of_folder(one) == weight_hash_of_folder(two) != weight_hash_of_folder(three)
    assert weight_hash({"a": journal.sha256(one / "a.safetensors")}) == weight_hash_of_folder(one)
    assert weight_hash_of_folder(tmp_path / "none") is None
    assert weight_hash(None) is None
