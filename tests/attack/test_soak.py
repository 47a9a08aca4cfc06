"""The soak: what it draws, and that it notices what it is there to notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sglang_probe.run import journal
from sglang_probe.run.run import Run, load_run
from tests.attack.mishaps import ALL, DISK, KILLS, SIGNALS, Mishap, build_shim, mishaps_of
from tests.attack.soak import page
from tests.attack.soak_harvest import HUNG, HarvestRound, configuration_of, judge, requests_of
from tests.attack.soak_live import KINDS, Life, LiveRound
from tests.attack.soak_live import judge as judge_live
from tests.made_run import OUTPUTS, PROMPTS, make_run

__all__ = ["make_run"]
ASKED = [{"prompt_ids": PROMPTS[rid], "max_new_tokens": 3} for rid in "ab"]


def test_a_round_follows_from_its_number() -> None:
    assert mishaps_of(7, 4) == mishaps_of(7, 4) != mishaps_of(8, 4)
    assert requests_of(7, 20) == requests_of(7, 20) != requests_of(8, 20)
    assert configuration_of(7, 20) == configuration_of(7, 20)


def test_everything_that_can_go_wrong_is_drawn_and_half_of_it_are_signals() -> None:
    drawn = [m.kind for n in range(200) for m in mishaps_of(n, 4)]
    assert set(drawn) == set(ALL)
    assert 0.45 < sum(kind in SIGNALS for kind in drawn) / len(drawn) < 0.65


def test_requests_share_beginnings() -> None:
    begins = [tuple(r["prompt_ids"][:5]) for r in requests_of(1, 100)]
    assert len(set(begins)) <= 8


WRITE = """
import os, sys, time
try:
    with open(sys.argv[1] + "/file", "wb", buffering=0) as f:
        print("wrote", f.write(b"x" * 100))
        os.fsync(f.fileno())
    print("synced")
    os.replace(sys.argv[1] + "/file", sys.argv[1] + "/renamed")
    print("renamed")
except OSError as e:
    print(e.strerror)
offset = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
print(round(offset - float(sys.argv[2])))
"""
FULL, BROKEN = "No space left on device", "Input/output error"


def compiles_c() -> bool:
    """Whether anything can be compiled here: then a `faults.c` that cannot is a failure, and no reason to skip."""
    if shutil.which("cc") is None:
        return False
    command = ["cc", "-x", "c", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"#include <dlfcn.h>\n", capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_disk_and_clock_fail_below_one_folder_alone_and_what_came_about_is_marked(tmp_path: Path) -> None:
    if not compiles_c():
        pytest.skip("no C compiler, or no headers of the C library")
    shim = build_shim(tmp_path)
    offset = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    concerned, other = tmp_path / "run", tmp_path / "run-2"
    concerned.mkdir()
    other.mkdir()

    def run(mishap: Mishap, folder: Path, when: Path | None = None) -> tuple[list[str], bool]:
        mark = tmp_path / "mark"
        mark.unlink(missing_ok=True)
        env = os.environ | mishap.environment(shim, concerned, mark, when)
        command = [sys.executable, "-c", WRITE, str(folder), str(offset)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines(), mark.exists()

    whole = ["wrote 100", "synced", "renamed", "0"]
    assert run(Mishap("disk full", after=50), concerned) == ([FULL, "0"], True)
    assert run(Mishap("disk full", after=100), concerned) == (whole, False)
    assert run(Mishap("disk broken"), other) == (whole, False)
    assert run(Mishap("sync fails"), concerned) == (["wrote 100", BROKEN, "0"], True)
    assert run(Mishap("rename fails"), concerned) == (["wrote 100", "synced", BROKEN, "0"], True)
    assert run(Mishap("disk broken"), concerned, tmp_path / "not there") == (whole, False)
    assert run(Mishap("disk slow", slow_us=1), concerned) == (whole, True)
    assert run(Mishap("short writes"), concerned) == (["wrote 50", "synced", "renamed", "0"], True)
    assert run(Mishap("clock back", jump=-60), concerned) == (["wrote 100", "synced", "renamed", "-60"], True)


def without(run: Run, table: str, rid: str) -> Run:
    """The run without what a table says of a request, under a journal that fits."""
    lines = []
    for part in journal.read(run.path):
        for name in part.files:
            if name.startswith(f"ledger/{table}-"):
                rows = pq.read_table(run.path / name)
                pq.write_table(rows.filter(pc.not_equal(rows["rid"], rid)), run.path / name)
                part.files[name] = journal.sha256(run.path / name)
        lines.append(json.dumps(part.__dict__) + "\n")
    (run.path / journal.NAME).write_text("".join(lines))
    return load_run(run.path)


def truncated(run: Run) -> Run:
    """The run, of which the last bytes of a part did not reach the disk."""
    name = next(name for name in journal.read(run.path)[0].files if name.startswith("ledger/spans-"))
    data = (run.path / name).read_bytes()
    (run.path / name).write_bytes(data[: len(data) // 2])
    return load_run(run.path)


def with_another_output(run: Run) -> Run:
    path = run.path / "requests.parquet"
    table = pq.read_table(path)
    ids = pa.array([[11, 12, 99], OUTPUTS["b"]], table.schema.field("output_ids").type)
    pq.write_table(table.set_column(table.schema.get_field_index("output_ids"), "output_ids", ids), path)
    return load_run(run.path)


PLANTED: dict[str, Callable[[Run], Run]] = {
    "the spans of a request are gone": lambda run: without(run, "spans", "b"),
    "the end of a request is gone": lambda run: without(run, "requests", "b"),
    "a part is cut off": truncated,
    "an output is another": with_another_output,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found_and_an_intact_run_passes(make_run: Callable[..., Run], planted: str) -> None:
    run = make_run()
    wrong, counts = judge(run, ASKED)
    assert wrong == []
    assert counts["requests"] == 2
    assert counts["positions"] == 16
    assert judge(PLANTED[planted](run), ASKED)[0] != []


def test_a_request_that_was_lost_or_is_another_is_found(make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert judge(run, [*ASKED, ASKED[0]])[0] == ["2 of 3 requests are there"]
    assert judge(run, [ASKED[1], ASKED[0]])[0] == ["a is not what was asked"]


def told(**fields: Any) -> Life:
    return Life(**{"exact": True, "served": True, "answers": dict(OUTPUTS), **fields})


@pytest.mark.parametrize(
    ("life", "wrong"),
    [
        (told(), []),
        (told(answers={**OUTPUTS, "c": [1]}), ["life 0: 1 answered requests are in no segment, the first is c"]),
        (told(exact=False, answers={**OUTPUTS, "c": [1]}), []),
        (
            told(answers={**OUTPUTS, "a": [1]}),
            ["1 requests have another output than was answered, the first is a"],
        ),
        (told(unanswered={"c": "500: no"}), ["life 0: 1 requests were not answered, the first is c: 500: no"]),
        (told(served=False, unanswered={"c": "killed"}), []),
    ],
)
def test_of_a_server_all_must_be_answered_and_what_was_answered_is_recorded(
    make_run: Callable[..., Run], life: Life, wrong: list[str]
) -> None:
    asked = dict(zip("ab", ASKED, strict=True))
    assert judge_live([make_run()], [life], asked)[0] == wrong


def test_a_request_in_two_segments_is_found(make_run: Callable[..., Run]) -> None:
    asked = dict(zip("ab", ASKED, strict=True))
    wrong, _ = judge_live([make_run("one"), make_run("two")], [told()], asked)
    assert wrong == ["2 requests ended twice, the first is a"]


def test_a_kill_of_a_server_is_called_what_it_is(tmp_path: Path) -> None:
    """A signal to the group of its processes is no kill of the first of them."""
    round_ = LiveRound(3, 4, tmp_path, tmp_path / "shim")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as process:
        round_._signal(SimpleNamespace(process=process), Mishap("all killed"))  # type: ignore[arg-type]
    assert process.returncode == -9
    assert round_.met == [("all killed", "starting")]
    assert [kind for kind in KINDS if kind in KILLS] == ["engine killed", "all killed"]


def test_a_command_that_hung_is_wrong_also_if_the_next_one_completes_the_run(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = HarvestRound(1, 2, tmp_path, tmp_path / "shim")
    round_.run, round_.asked = make_run().path, ASKED
    codes = iter([HUNG, 0])
    monkeypatch.setattr(round_, "_configure", lambda: (configuration_of(1, 2)[0], tmp_path))
    monkeypatch.setattr(round_, "_command", lambda *_: next(codes))
    assert round_.play()["wrong"] == ["a command did not end in 600 s and was killed; exit codes [124, 0]"]


def test_the_page_counts_kills_that_landed_and_names_rounds_that_went_wrong() -> None:
    counts = {"requests": 100, "positions": 5000, "rows": 4000, "asked_again": 3, "refused": 0}
    where = {"commit": "abc", "versions": "sglang 1", "device": "CPU"}
    base = {"kind": "harvest", "seconds": 360.0, "counts": counts, "where": where, "codes": [137, 0], "options": {}}
    good = {**base, "round": 1, "met": [["all killed", "serving"]], "missed": [DISK[0]], "wrong": []}
    bad = {**base, "round": 2, "met": [["disk slow", "serving"]], "missed": [], "wrong": ["tiling: a hole"]}
    text = page([good, bad])
    assert "200 requests, 10,000 positions, 8,000 numbered rows, 1 SIGKILLs" in text
    assert "a million requests would take 1,000 hours and a thousand kills 200 hours" in text
    assert "| all killed | 0 | 1 | 0 |" in text
    assert "| disk full | 0 | 0 | 1 |" in text
    assert "* round 2 (harvest): tiling: a hole" in text
