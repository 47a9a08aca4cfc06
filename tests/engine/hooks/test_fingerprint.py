"""Fingerprints of source: what changes them, what does not, and whence they are taken."""

from __future__ import annotations

import textwrap
import zipfile
from pathlib import Path

import pytest

from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.hooks.fingerprint import Wheel, absent, find, fingerprint
from sglang_probe.errors import InventoryError


class Text:
    """One module, `pkg.mod`, whose source is given."""

    def __init__(self, source: str) -> None:
        self.source = textwrap.dedent(source)

    def text(self, module: tuple[str, ...]) -> str | None:
        return self.source if module == ("pkg", "mod") else None


def _print(source: str, relies_on: list[str] | None = None, target: str = "pkg.mod.C.f") -> str | None:
    return fingerprint(target, relies_on, Text(source))


PLAIN = "class C:\n    def f(self, x=1):\n        return x + 1\n"


def test_formatting_comments_and_docstrings_do_not_change_a_fingerprint() -> None:
    dressed = '''
        class C:
            """Doc."""
            def f(self,
                  x = 1):
                """Doc."""
                # why
                return (x
                        + 1)
        '''
    assert _print(PLAIN) == _print(dressed) is not None


def test_any_change_of_code_changes_it() -> None:
    bodies = ("return x + 1", "return x + 2", "return x - 1", "return x", "return self.x + 1")
    assert len({_print(f"class C:\n    def f(self, x=1):\n        {body}\n") for body in bodies}) == 5


def test_a_target_that_is_gone_is_missing() -> None:
    assert _print("class C:\n    def g(self): pass\n") is None
    assert _print(PLAIN, target="pkg.nowhere.f") is None
    assert fingerprint("no_such_package.f") is None


WHOLE = """
class C:
    def f(self, reqs, log=None):
        self.unrelated = 1
        if reqs:
            self.other(reqs)
            self.lens = [len(r) for r in reqs]
        def inner():
            return self.lens
        return self.copy(reqs=reqs, lens=self.lens, pool=self.pool)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.unrelated = 1", "self.unrelated = 2\n        self.more = 3"),
        ("            self.other(reqs)\n", ""),
        ("pool=self.pool", "pool=None, more=1"),
        ("log=None", "log: int | None=None"),
    ],
)
def test_what_is_not_relied_on_may_change(old: str, new: str) -> None:
    changed = WHOLE.replace(old, new)
    assert changed != WHOLE
    assert _print(changed, ["lens"]) == _print(WHOLE, ["lens"]) is not None
    if "int" not in new:
        assert _print(changed) != _print(WHOLE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[len(r) for r in reqs]", "[len(r) + 1 for r in reqs]"),  # the statement
        ("if reqs:", "if reqs and self.ready:"),  # what it stands in
        ("            self.lens", "            while True: self.lens"),
        ("def inner()", "def inner(x)"),
        ("lens=self.lens", "lens=self.unrelated"),  # the keyword
        ("self.copy(", "self.clone("),  # what is called with it
        ("log=None", "log=1"),  # a default
        ("reqs, log", "reqs, more, log"),  # a parameter
        ("        return self.copy", "        self.lens = 0\n        return self.copy"),  # another statement
    ],
)
def test_what_is_relied_on_may_not(old: str, new: str) -> None:
    changed = WHOLE.replace(old, new)
    assert changed != WHOLE
    assert _print(changed, ["lens"]) != _print(WHOLE, ["lens"])


def test_parameters_alone_are_relied_on_where_no_name_is() -> None:
    assert _print(PLAIN, []) == _print(PLAIN.replace("x + 1", "x + 2"), []) != _print(PLAIN.replace("x=1", "x"), [])


def test_a_name_that_nothing_mentions_is_missing() -> None:
    assert _print(WHOLE, ["lens", "lense"]) is None
    node = find("pkg.mod.C.f", Text(WHOLE))
    assert node is not None
    assert absent(node, ["lens", "lense", "return"]) == ["lense"]


def test_of_a_class_the_method_named_is_relied_on_whole() -> None:
    source = "class C(Base):\n    def f(self):\n        a()\n        b()\n    def g(self):\n        c()\n"
    prints = {_print(s, ["f"], "pkg.mod.C") for s in (source, source.replace("c()", "d()"))}
    assert len(prints) == 1
    assert _print(source.replace("b()", "d()"), ["f"], "pkg.mod.C") not in prints
    assert _print(source.replace("Base", "Other"), ["f"], "pkg.mod.C") not in prints


def make_wheel(folder: Path, version: str, *, name: str = "sglang", files: dict[str, str] | None = None) -> Path:
    """A wheel with these modules."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file, text in (files or {}).items():
            z.writestr(file, text)
    return path


def test_a_wheel_is_read_without_installing_it(tmp_path: Path) -> None:
    wheel = Wheel(
        make_wheel(tmp_path, "9.9.9", files={"sglang/srt/__init__.py": "def g(): pass\n", "sglang/srt/m.py": PLAIN})
    )
    assert wheel.version == "9.9.9"
    assert fingerprint("sglang.srt.m.C.f", None, wheel) == _print(PLAIN)
    assert fingerprint("sglang.srt.g", None, wheel) is not None
    assert fingerprint("sglang.srt.n.C.f", None, wheel) is None


def test_what_is_no_wheel_of_sglang_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "zip", "w") as z:
        z.writestr("a.py", "")
    for file, why in [("text", "cannot be read"), ("zip", "no METADATA"), ("nowhere", "cannot be read")]:
        with pytest.raises(InventoryError, match=why):
            Wheel(tmp_path / file)
    with pytest.raises(InventoryError, match="a wheel of vllm"):
        Wheel(make_wheel(tmp_path, "1.0", name="vllm"))


def test_every_name_that_is_relied_on_is_mentioned() -> None:
    """In the release that was reviewed; else a slice would be empty and nothing could change it."""
    for target in inventory.load_inventory().targets:
        node = find(target.target)
        assert node is not None
        assert not absent(node, target.relies_on or ()), target.target


def test_a_release_that_was_not_reviewed_is_compared_with_the_one_it_differs_least_from(tmp_path: Path) -> None:
    known = inventory.known_versions()
    assert inventory.nearest_inventory("9.9.9").sglang == inventory.installed_version()
    nothing_known = Wheel(make_wheel(tmp_path, "9.9.9"))
    assert inventory.nearest_inventory("9.9.9", nothing_known).sglang == known[-1]
    assert inventory.nearest_inventory(known[0], nothing_known).sglang == known[0]
