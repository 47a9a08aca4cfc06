"""What YAML means, which key is suggested, and where a relative path leads."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from sglang_probe.config import Config, InputPath, load_config, parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.policy.arm import Arm
from sglang_probe.yaml_text import read_yaml


@pytest.fixture
def yaml(tmp_path: Path) -> Any:
    def read(text: str) -> dict[str, Any]:
        path = tmp_path / "a.yaml"
        path.write_text(text)
        return read_yaml(path)

    return read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("12", 12),
        ("-12", -12),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("'1e-3'", "1e-3"),
        ("on", True),
        ("no", False),
        ("~", None),
    ],
)
def test_values_are_those_of_yaml_1_2(yaml: Any, text: str, value: Any) -> None:
    found = yaml(f"a: {text}\n")["a"]
    assert (found, type(found)) == (value, type(value))


def test_keys_are_what_is_written(yaml: Any) -> None:
    assert list(yaml("on: 1\noff: 2\n64: 3\nnull: 4\n1e3: 5\n")) == ["on", "off", "64", "null", "1e3"]


def test_a_key_that_is_there_twice_is_refused_with_its_line(yaml: Any) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml is not valid YAML: the key `b` is there twice(.|\n)*line 3"):
        yaml("a: {b: 1}\nb: 1\nb: 2\n")
    assert yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n")["y"] == {"a": 1, "b": 3}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_as_windows_writes_it(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("a: ß\r\n".encode(encoding))
    assert read_yaml(path) == {"a": "ß"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"- 1\n", "found list"),
        (b"a: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"\x80\x81", "is not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        read_yaml(path)


class Left(Config):
    kind: Literal["left"]
    height: int = 1


class Right(Config):
    hints: ClassVar = {"len": "say `length`"}
    kind: Literal["right"]
    length: int = 1


class Steps(Config):
    steps: int


class Whole(Config):
    sides: dict[str, Annotated[Left | Right, Field(discriminator="kind")]] = Field(default_factory=dict)
    many: list[Left] = Field(default_factory=list)
    either: Literal["all"] | Steps = "all"
    arms: dict[str, Arm] = Field(default_factory=dict)
    heights: int = 0
    start: int = Field(default=0, alias="from")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sides": {"a": {"kind": "left", "heigth": 1}}}, "`sides.a.left.heigth`; did you mean `height`?"),
        ({"sides": {"a": {"kind": "right", "height": 1}}}, "`sides.a.right.height`; known keys: kind, length"),
        ({"sides": {"a": {"kind": "right", "len": 1}}}, "`sides.a.right.len`: say `length`"),
        ({"many": [{"kind": "left", "heihgt": 1}]}, "`many.0.heihgt`; did you mean `height`?"),
        ({"either": {"step": 1}}, "did you mean `steps`?"),
        ({"height": 1}, "`height`; did you mean `heights`?"),
        ({"length": 1}, "`length`; known keys: arms, either, from, heights, many, sides"),
        ({"form": 1}, "did you mean `from`?"),
        ({"arms": {"a": {"cachee": "on"}}}, "`arms.a.cachee`; did you mean `cache`?"),
    ],
)
def test_hints_are_keys_of_the_same_level(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_config(data, Whole, where="x")
    assert said in e.value.message


def test_a_boolean_where_a_word_is_wanted_says_what_yaml_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("either: on\n")
    with pytest.raises(ConfigError, match="YAML reads an unquoted on, off, yes, no"):
        load_config(path, Whole)


class Reads(Config):
    file: InputPath


def test_a_relative_path_is_relative_to_the_yaml_and_else_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(here)
    (there / "a.yaml").write_text("file: data/x\n")

    def file() -> Path:
        return load_config(there / "a.yaml", Reads).file

    assert file() == there / "data/x"  # neither is there: the error will name this one
    (here / "data").mkdir()
    (here / "data/x").touch()
    with caplog.at_level(logging.WARNING):
        assert file() == Path("data/x")
    assert f"there is no {there / 'data/x'}" in caplog.text
    (there / "data").mkdir()
    (there / "data/x").touch()
    caplog.clear()
    assert file() == there / "data/x"
    assert not caplog.text
    (there / "a.yaml").write_text(f"file: {here}/data/x\n")
    assert file() == here / "data/x"


def test_an_unknown_kind_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"`workload`: unknown source `json`; did you mean `jsonl`\?$"):
        parse_config({"workload": {"source": "json", "path": "x"}}, HarvestConfig, where="a.yaml")
    with pytest.raises(ConfigError, match=r"unknown source `csv`; known: .*sharegpt"):
        parse_config({"workload": {"source": "csv"}}, HarvestConfig, where="a.yaml")
