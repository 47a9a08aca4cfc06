"""What the documentation names exists, and what it shows works."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer.main
import yaml
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from sglang_probe.cli import app
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.run.run import Run
from sglang_probe.studies.base import RecordedStudy
from sglang_probe.studies.catalogue import STUDIES
from tests.made_run import make_run  # noqa: F401

ROOT = Path(__file__).parent.parent
_generator = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert _generator is not None
assert _generator.loader is not None
generate: Any = module_from_spec(_generator)
_generator.loader.exec_module(generate)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("experiments/**/*.md"))]
WITHOUT_GENERATED = [p for p in PAGES if generate.DO_NOT_EDIT not in p.read_text(encoding="utf-8")]
YAMLS: list[type[BaseModel]] = [
    HarvestConfig,
    EngineProbeConfig,
    *(s.config() for s in STUDIES if isinstance(s, RecordedStudy)),
]
BEING_ADDED = {"docs/strip.svg"}
"""What pages name before it is merged."""

pages = pytest.mark.parametrize("page", WITHOUT_GENERATED, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """Info string and text of the fenced blocks of a page in some languages."""
    for info, text in re.findall(r"^```(.*?)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if info.split(" ")[0] in languages:
            yield info, text


@pytest.mark.parametrize(
    "page",
    [
        "docs/evidence/paths.md",
        "docs/explanation/cached-tokens.md",
        "docs/how-to/evict-in-the-engine.md",
        "docs/evidence/support.md",
        "docs/evidence/releases.md",
    ],
)
def test_a_page_that_rests_on_tests_names_them(page: str) -> None:
    assert len(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text(encoding="utf-8")))) >= 5


def test_every_test_that_a_page_names_exists() -> None:
    for page in PAGES:
        named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")))
        for file, test in named:
            assert (ROOT / file).exists(), f"{page.name}: {file}"
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{page.name}: {file}::{test}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if target in BEING_ADDED:
                continue
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor[1:] in headings(found), f"{page.name}: {target}{anchor}"


def headings(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / t).resolve() for t in re.findall(r"\]\(([^)#:]+)\)", index.read_text(encoding="utf-8"))}
    missing = [p for p in ROOT.glob("docs/*/*.md") if p.resolve() not in linked]
    assert missing == []


@pytest.mark.parametrize("path", generate.pages())
def test_generated_pages_are_what_the_code_says(path: str) -> None:
    assert (ROOT / "docs" / path).read_text(encoding="utf-8") == generate.pages()[path], "run `make docs`"


def test_every_key_of_every_yaml_has_a_meaning() -> None:
    page = generate.configuration()
    empty = [row for row in page.splitlines() if row.startswith("| `") and row.endswith("|  |")]
    assert [row for row in empty if not row.startswith("| `source`")] == []


@pages
def test_yaml_in_the_pages_is_accepted(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        data = yaml.safe_load(text)
        if not isinstance(data, dict):
            continue
        refusals = [refusal(model, data) for model in YAMLS]
        assert None in refusals, f"{text}\n{refusals[0]}"


def refusal(model: type[BaseModel], data: dict[str, Any]) -> str | None:
    """Why a block, or a part of a YAML, is not what this model reads; None: it is."""
    whole = {"workload": {"source": "shared_prefix"}, "layers": [0], "run": "runs/live", "live": {"privacy": "ids"}}
    least = {k: v for k, v in whole.items() if k in model.model_fields}
    refused = None
    for candidate in (data, {**least, **data}):
        try:
            model.model_validate(candidate)
        except ValidationError as e:
            refused = str(e)
        else:
            return None
    return refused


def command_lines(page: Path) -> Iterator[str]:
    """Shell commands of the blocks of a page, continued lines joined."""
    for info, text in blocks(page, "bash", "console", ""):
        for line in text.replace("\\\n", " ").splitlines():
            if info.startswith("console") and not line.startswith("$ "):
                continue
            for part in re.split(r" && | \|\| ", line.removeprefix("$ ").split("  #")[0]):
                if part.strip():
                    yield part.strip()


def options_of(command: Any) -> set[str]:
    """Every flag of a command."""
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}


@pytest.fixture(scope="module")
def server_arguments() -> str:
    """Where SGLang defines its server arguments, as text: importing it takes long."""
    located = find_spec("sglang")
    assert located is not None
    assert located.submodule_search_locations is not None
    srt = Path(next(iter(located.submodule_search_locations))) / "srt"
    return "".join(p.read_text(encoding="utf-8") for p in (srt / "server_args.py", *srt.glob("arg_groups/**/*.py")))


@pages
def test_options_in_the_pages_exist(page: Path, server_arguments: str) -> None:
    root: Any = typer.main.get_command(app)
    inline = re.findall(r"`(sglang-probe [^`]+)`", page.read_text(encoding="utf-8"))
    for line in [*command_lines(page), *inline]:
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
        if words[:1] == ["sglang-probe"]:
            name = words[1] if len(words) > 1 else "--help"
            if name in BEING_ADDED or name.startswith(("-", "<")):
                continue
            assert name in root.commands, f"{page.name}: {line}"
            command = root.commands[name]
            groups = iter(words[2:])
            while hasattr(command, "commands") and (word := next(groups, None)) is not None:
                assert word in command.commands, f"{page.name}: {line}"
                command = command.commands[word]
            unknown = {w.split("=")[0] for w in words[2:] if w.startswith("--")} - options_of(command)
            assert unknown == set(), f"{page.name}: {line}"
        elif words[:3] == ["python", "-m", "sglang.launch_server"]:
            for flag in (w for w in words[3:] if w.startswith("--")):
                field = flag[2:].replace("-", "_")
                assert re.search(rf"\b{field}: |\"{flag}\"", server_arguments), f"{page.name}: {flag}"
        elif words[:1] == ["make"]:
            made = {t for t in words[1:] if re.fullmatch(r"[a-z][\w-]*", t)} - BEING_ADDED
            targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert made <= targets, f"{page.name}: {line}"
        elif words[:1] in (["python"], ["bash"]) and len(words) > 1 and words[1].endswith((".py", ".sh")):
            assert (ROOT / words[1]).exists() or "/" not in words[1], f"{page.name}: {line}"


@pages
def test_imports_of_python_in_the_pages_exist(page: Path) -> None:
    for _, text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang_probe"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_the_tutorial_shows_its_files() -> None:
    (page,) = (ROOT / "docs" / "tutorial").glob("*.md")
    shown = {info.partition("file=")[2]: text for info, text in blocks(page, "python", "yaml") if "file=" in info}
    files = {f.name for f in page.parent.iterdir() if f.suffix in (".py", ".yaml")}
    assert shown.keys() == files
    for name, text in shown.items():
        assert (page.parent / name).read_text(encoding="utf-8") == text, name


READERS = [
    ("README.md", 0),
    ("docs/reference/run-directory.md", 0),
    ("docs/how-to/weigh-a-harvest.md", 0),
    ("docs/reference/eviction.md", 0),
    ("docs/tutorial/look.py", None),
    ("docs/tutorial/train.py", None),
]
"""Python that needs no engine: the file, and the number of its block."""


@pytest.mark.parametrize(("file", "number"), READERS)
def test_python_that_needs_no_engine_works(
    file: str,
    number: int | None,
    make_run: Callable[..., Run],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run()
    text = (ROOT / file).read_text(encoding="utf-8")
    code = text if number is None else list(blocks(ROOT / file, "python"))[number][1]
    # The made run has other names than the page.
    code = re.sub(r"blocks\.\d+\.hook_resid_post", "hook_embed", code).replace("r000000", "a")
    weights = pd.DataFrame({"rid": ["a"], "start": [0], "end": [6], "weight": [2.0]})
    for place in ("runs/mine", "runs/live/segment-00000"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(run.path)
    (run.path / "coverage").mkdir()
    for axis in ("segment", "role"):
        weights.to_parquet(run.path / "coverage" / f"weights-{axis}.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(_without_training(code), file, "exec"), names)
    batches = [v for v in names.values() if hasattr(v, "__next__")]
    if "rows" in names:
        batches.append(names["rows"]())
    for batch in batches:
        assert next(batch).shape[1] == 8
    assert batches or names.keys() & {"x", "batch", "keep"}


def _without_training(code: str) -> ast.Module:
    """The code, up to where SAELens, which is not a dependency, is used."""
    tree = ast.parse(code)
    theirs = {
        a.asname or a.name
        for n in tree.body
        if isinstance(n, ast.ImportFrom) and "sae" in str(n.module)
        for a in n.names
    }
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and "sae" in str(node.module):
            continue
        if any(isinstance(n, ast.Name) and n.id in theirs for n in ast.walk(node)):
            break
        kept.append(node)
    return ast.Module(kept, tree.type_ignores)


def test_every_command_that_reads_a_yaml_prints_what_it_may_hold() -> None:
    root: Any = typer.main.get_command(app)
    reading = {n for n, c in root.commands.items() if any("YAML" in (getattr(p, "help", "") or "") for p in c.params)}
    assert {"harvest", "live", "ab", "lossless", "phase", "evict", "factorial"} <= reading
    for name in sorted(reading):
        done = CliRunner().invoke(app, [name, "--schema"])
        assert done.exit_code == 0, f"{name}: {done.output}"
        assert json.loads(done.stdout)["additionalProperties"] is False


def test_the_yaml_of_a_live_server_is_checked_before_the_server_starts(tmp_path: Path) -> None:
    path = tmp_path / "probe.yaml"
    path.write_text(CliRunner().invoke(app, ["live", "--example"]).stdout)
    done = CliRunner().invoke(app, ["live", str(path)])
    assert done.exit_code == 0
    assert "rows of hook_embed" in done.stdout
    for text, told in (("{run: r, live: {privcy: ids}}", "privacy"), ("{run: r}", "`live` is missing")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            CliRunner().invoke(app, ["live", str(path)], catch_exceptions=False)
