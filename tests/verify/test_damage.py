"""Every kind of damage ends in a sentence that names the file: never in a traceback, and `--json` prints JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sglang_probe.cli import app
from sglang_probe.errors import ProbeError
from sglang_probe.run import seal
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.amended import amend
from tests.verify.good_run import POINTS, make_good_run

FILES = (
    *("manifest.json", "journal.jsonl", "seal.json", "requests.parquet", "embedding.parquet", "kept.safetensors"),
    *("ledger/spans-00000.parquet", "ledger/forwards-00001.parquet", "ledger/requests-00001.parquet"),
    *("ledger/rebinds-00000.parquet", "telemetry/part-00000.parquet", "rows/hook_embed/shard-00000.safetensors"),
    *("rows/blocks.0.attn.hook_v/shard-00001.safetensors", "README.md", "probe.yaml"),
)
WAYS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "garbage": lambda p: p.write_bytes(b"\xff\x00PAR1garbage" * 20),
    "JSON of something else": lambda p: p.write_text("[1, 2]"),
    "a directory": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good_run(tmp_path_factory.mktemp("good")).path


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def ask(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize("file", FILES)
def test_verify_names_the_file_and_ends_with_1_and_json_stays_json(run: Path, file: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    for way, damage in WAYS.items():
        shutil.copytree(run, kept)
        damage(kept / file)
        done = ask("verify", kept, "--json")
        told = json.loads(done.stdout)
        assert (done.exit_code, told["ok"]) == (1, False), way
        violations = [c["violation"] for c in told["checks"] if c["violation"]]
        assert Path(file).name in violations[0], (way, violations)
        assert "could not be asked" not in str(violations)
        shutil.rmtree(kept)


def test_a_readable_sentence_comes_without_json_too(run: Path) -> None:
    (run / MANIFEST).write_text("{")
    done = ask("verify", run)
    assert done.exit_code == 1
    assert "VIOLATED" in done.stdout
    assert f"{MANIFEST} is damaged" in done.stdout.replace("\n", "")


def test_what_is_no_run_directory_is_refused_with_2_and_in_json(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "study" / "first").mkdir(parents=True)
    (tmp_path / "study" / "first" / MANIFEST).touch()
    for path, said in (
        (tmp_path, "is not a run directory"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is a file, not a run directory"),
        (tmp_path / "study", "name one of the runs in it: first"),
    ):
        done = ask("verify", path, "--json")
        assert done.exit_code == 2
        assert said in done.stdout
        assert json.loads(done.stdout)["ok"] is False


@pytest.mark.parametrize("file", [*FILES[:2], FILES[3], FILES[6], FILES[10], FILES[11]])
def test_readers_raise_an_error_of_ours_that_names_the_file(run: Path, file: str, tmp_path: Path) -> None:
    """What a study does with a run. A file that it does not read may be damaged."""
    readers = ["spans", "forwards", "rebinds", "requests", "engine_requests", "tokens", "telemetry", "activations"]
    for way, damage in WAYS.items():
        copy = tmp_path / way
        shutil.copytree(run, copy)
        damage(copy / file)
        said = [_said(copy, read) for read in readers]
        assert any(said), way
        assert all(Path(file).name in message for message in said if message), (way, said)
        shutil.rmtree(copy)


def _said(path: Path, read: str) -> str | None:
    """What a reader of a run raises; anything but an error of ours is passed on."""
    try:
        run = load_run(path)
        if read == "activations":
            run.activations("r000001", POINTS[0])
        else:
            getattr(run, read)()
    except ProbeError as e:
        return e.message
    return None


@pytest.mark.parametrize("file", ["manifest.json", "journal.jsonl", "requests.parquet", "ledger/spans-00000.parquet"])
def test_coverage_of_a_damaged_run_is_an_error_of_ours(run: Path, file: str, tmp_path: Path) -> None:
    for way, damage in WAYS.items():
        copy = tmp_path / way
        shutil.copytree(run, copy)
        damage(copy / file)
        done = ask("coverage", copy, "--output", tmp_path / "out")
        assert isinstance(done.exception, ProbeError), (way, done.exception)


def test_a_good_run_holds_and_every_check_covers_something(good: Path) -> None:
    checks = verify(load_run(good))
    assert {c.name: c.violation for c in checks if not c.holds or not c.covered} == {}
    assert {c.name for c in checks} >= {"files", "requests", "manifest", "telemetry", "kept sets", "content", "rows"}
    assert ask("verify", good).exit_code == 0


def test_what_users_and_studies_put_beside_breaks_nothing(run: Path) -> None:
    (run / "coverage").mkdir()
    for name in ("coverage/report.html", "report.html", "notes.txt", "rows.md"):
        (run / name).write_text("mine")
    assert [c.violation for c in verify(load_run(run)) if not c.holds] == []


def test_a_run_from_before_seals_is_verified_as_far_as_it_goes_and_that_is_said(run: Path) -> None:
    (run / seal.NAME).unlink()
    amend(run, lambda m: (m.update(schema_version=4), m.pop("positions_intervened"))[0])
    checks = verify(load_run(run))
    assert [c.violation for c in checks if not c.holds] == []
    assert "schema 4 has no seal" in str(checks[0].note)


def test_a_run_whose_closing_was_cut_short_is_incomplete_and_has_no_false_violation(run: Path) -> None:
    """Killed between the seal and the manifest, or resumed and killed: the seal is of another end."""
    manifest = json.loads((run / MANIFEST).read_text())
    begun = {k: v for k, v in manifest.items() if k not in ("files", "facts", "requests_by_finish", "rows")}
    begun = {k: v for k, v in begun.items() if not k.startswith("positions_by")}
    (run / MANIFEST).write_text(json.dumps({**begun, "status": "incomplete"}))
    checks = verify(load_run(run))
    assert [c.violation for c in checks if not c.holds] == []
    assert "was not closed" in str(checks[0].note)
    assert ask("verify", run).exit_code == 1


def test_a_card_that_is_written_again_stays_under_the_seal(run: Path) -> None:
    from sglang_probe.studies.coverage.card import write_card

    (run / "README.md").write_text("another card")
    assert "README.md was changed" in str(verify(load_run(run))[0].violation)
    write_card(load_run(run))
    assert verify(load_run(run))[0].violation is None
