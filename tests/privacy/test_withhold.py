"""A scrubbed run: what is personal is gone by position, everything else is there, and `verify` asks for both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.harvest.directory import hold_directory
from sglang_probe.harvest.withholding import settle_withheld, withhold_recorded
from sglang_probe.privacy.withhold import (
    NEIGHBOUR,
    Withhold,
    _is_withheld,
    found_in,
    is_scrubbed,
    reasons_of,
    withhold,
    withhold_in_place,
)
from sglang_probe.run import tokens as positions
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.schema import ENGINE_REQUESTS
from sglang_probe.verify.verify import verify
from sglang_probe.verify.withheld import withheld_positions
from tests.declared import run_commands
from tests.engine.live.conftest import FakeEngine
from tests.verify.good_run import POINTS, SHARED, VOCABULARY, make_good_run

MAIL = (6, 7, 8)
"""Token ids that spell an address; every request of the run begins with them, at positions 2 to 4."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {f"\u2581w{i}": i for i in range(VOCABULARY) if i not in (*MAIL, 9)}
    vocab |= {"\u2581ann@": 6, "example": 7, ".org": 8, "\u2581and": 9}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    return folder


@pytest.fixture(scope="module")
def scrubbed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("runs")
    run = make_good_run(folder / "run")
    withhold(run, folder / "scrubbed", tokenizer, Withhold())
    return run, load_run(folder / "scrubbed")


def test_rows_and_ids_of_what_was_found_are_gone_and_all_others_are_there(scrubbed: tuple[Run, Run]) -> None:
    before, after = scrubbed
    assert [c.violation for c in verify(before) if not c.holds] == []
    assert [c.violation for c in verify(after) if not c.holds] == []
    assert {c.name for c in verify(after)} >= {"withheld", "lineage", "rebinds", "content", "rows"}
    told = after.withheld()
    assert set(told["reason"]) == {"pii:email", NEIGHBOUR}
    sharing = [r.rid for r in before.requests(interrupted=True).itertuples() if list(r.prompt_ids[:8]) == SHARED]
    assert len(sharing) >= 3
    for r in after.requests(interrupted=True).itertuples():
        if r.rid in sharing:
            mine = told[told["rid"] == r.rid]
            assert mine[["start", "end", "reason"]].to_numpy().tolist()[:3] == [
                [1, 2, NEIGHBOUR],
                [2, 5, "pii:email"],
                [5, 6, NEIGHBOUR],
            ]
            assert list(r.prompt_ids[:8]) == [*SHARED[:2], -1, -1, -1, *SHARED[5:]]
    tokens = positions.expand(before.spans()[before.spans()["row_start"] >= 0])
    reason = withheld_positions(after, tokens["rid"].to_numpy(), tokens["position"].to_numpy())
    gone = tokens["row"].to_numpy()[reason != ""]
    assert len(gone)
    for point in POINTS:
        kept = {int(n): x for numbers, rows in before.iter_shards(point) for n, x in zip(numbers, rows, strict=True)}
        now = {int(n): x for numbers, rows in after.iter_shards(point) for n, x in zip(numbers, rows, strict=True)}
        assert set(now) == set(kept) - set(gone.tolist())
        assert all(torch.equal(now[n], kept[n]) for n in now)
    assert not after.holds("hook_embed", gone).any()
    for name in ("spans", "forwards", "rebinds"):
        assert getattr(after, name)().equals(getattr(before, name)())


def test_nothing_of_the_copy_holds_an_id_that_was_withheld_everywhere(scrubbed: tuple[Run, Run]) -> None:
    _, after = scrubbed
    requests = after.requests(interrupted=True)
    ids = np.concatenate([*requests["prompt_ids"], *(x for x in requests["output_ids"] if x is not None)])
    assert (ids == -1).any()
    ended = after.engine_requests()
    assert ended["output_ids"].map(list).tolist() == [
        list(requests.set_index("rid")["output_ids"][rid]) for rid in ended["rid"]
    ]
    rows = sum(len(b) for b in after.iter_batches("hook_embed", batch_size=64))
    assert rows > 0  # whoever trains gets what is left, and no gap


@pytest.mark.parametrize("plant", ["row", "id", "other id", "count", "rule"])
def test_verify_names_what_is_there_against_the_ledger(
    tmp_path: Path, tokenizer: Path, plant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_probe.privacy import withhold as module

    run = make_good_run(tmp_path / "run")
    if plant == "row":
        monkeypatch.setattr(module, "_rows_gone", lambda *_a: np.empty(0, np.int64))
    if plant == "id":
        monkeypatch.setattr(module, "_ids", lambda table, _own, prompt: table)
    if plant == "other id":
        ids = module._ids
        wide = lambda own: {k: np.ones_like(v) for k, v in own.items()}  # noqa: E731
        monkeypatch.setattr(module, "_ids", lambda table, own, prompt: ids(table, wide(own), prompt=prompt))
    withhold(run, tmp_path / "out", tokenizer, Withhold())
    manifest = tmp_path / "out" / "manifest.json"
    if plant in ("count", "rule"):
        told = json.loads(manifest.read_text())
        told["withheld"] = {**told["withheld"], "positions": {}} if plant == "count" else None
        from sglang_probe.run import seal

        seal.close(tmp_path / "out", told)
    found = {c.name: c.violation for c in verify(load_run(tmp_path / "out")) if not c.holds}
    says = {
        "row": "which is withheld",
        "id": "its token id is there",
        "other id": "missing without a reason",
        "count": "the manifest counted",
        "rule": "does not say by which rule",
    }[plant]
    assert says in str(found.get("withheld")), found


def test_what_requests_share_is_withheld_of_all_of_them(tokenizer: Path) -> None:
    import pandas as pd

    # The second one ends within the address, so that alone nothing would be found in it.
    frame = pd.DataFrame({"rid": ["a", "b"], "prompt_ids": [[1, 6, 7, 8, 2], [1, 6, 7, 9, 3]], "output_ids": [[], []]})
    told = reasons_of(frame, Vocabulary.load(tokenizer), Withhold(neighbours=0))
    assert told["a"].tolist() == [None, *["pii:email"] * 3, None]
    assert told["b"].tolist() == [None, *["pii:email"] * 2, None, None]


def test_positions_are_those_of_the_tokens_that_hold_a_byte_of_what_was_found(tokenizer: Path) -> None:
    vocabulary = Vocabulary.load(tokenizer)
    assert found_in([1, 6, 7, 8, 9], vocabulary, Withhold(pii=["email"])) == [(1, 4, "pii:email")]
    assert found_in([1, 6, -1, 7, 8], vocabulary, Withhold()) == []
    assert found_in([], vocabulary, Withhold()) == []


def test_the_command_refuses_what_it_cannot_scrub(
    scrubbed: tuple[Run, Run], tokenizer: Path, tmp_path: Path, cli: Callable
) -> None:
    before, after = scrubbed
    args = ["scrub", str(before.path), "--model", str(tokenizer), "--pii", "email", "--output", str(tmp_path / "x")]
    assert list(run_commands([args]).values()) == [0]
    with pytest.raises(ConfigError, match="exists"):
        withhold(before, tmp_path / "x", tokenizer, Withhold())
    with pytest.raises(ConfigError, match="withheld already"):
        withhold(after, tmp_path / "y", tokenizer, Withhold())
    assert not list(tmp_path.glob(".*partial"))


def test_a_harvest_that_withholds_puts_the_copy_in_the_place_of_the_run(tmp_path: Path, tokenizer: Path) -> None:
    run = make_good_run(tmp_path / "run")
    assert not is_scrubbed(run.path)
    after = withhold_in_place(run, tokenizer, Withhold(pii=["email"], neighbours=0))
    assert after.path == run.path
    assert set(after.withheld()["reason"]) == {"pii:email"}
    assert is_scrubbed(run.path)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert all(c.holds for c in verify(load_run(run.path)))


class _Killed(BaseException):
    """As nothing catches it: a kill."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Ends `withhold_in_place` at a step; a folder that is being deleted has lost its manifest then."""
    from sglang_probe.privacy import withhold as module

    rename, rmtree, copy = Path.rename, shutil.rmtree, module._copy

    def renaming(path: Path, target: Path) -> Path:
        if {"the run is renamed": "run", "the copy is renamed": ".run.scrubbed"}.get(step) == path.name:
            raise _Killed
        return rename(path, target)

    def deleting(path: Path, **given: bool) -> None:
        if step == "the copy is written" and path.name == "..run.scrubbed.partial":
            return
        if step == "the raw is deleted" and path.name == ".run.raw":
            (path / "manifest.json").unlink()
            raise _Killed
        rmtree(path, **given)

    def copying(*args: Any) -> dict[str, int]:
        told = copy(*args)
        if step == "the copy is written":
            raise _Killed
        return told

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(module.shutil, "rmtree", deleting)
    monkeypatch.setattr(module, "_copy", copying)


@pytest.mark.parametrize(
    ("step", "left", "scrubbed"),
    [
        ("the copy is written", {"run", "..run.scrubbed.partial"}, False),
        ("the run is renamed", {"run", ".run.scrubbed"}, False),
        ("the copy is renamed", {".run.raw", ".run.scrubbed"}, True),
        ("the raw is deleted", {"run", ".run.raw"}, True),
    ],
)
def test_what_a_kill_left_is_finished_by_the_next_command(
    tmp_path: Path, tokenizer: Path, step: str, left: set[str], scrubbed: bool
) -> None:
    run = make_good_run(tmp_path / "run")
    folder = run.path.parent
    model = {"model", "kept.safetensors"} & {p.name for p in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        _kill_at(patch, step)
        with pytest.raises(_Killed):
            withhold_recorded(run, tokenizer, Withhold())
    assert {p.name for p in folder.iterdir()} - model == left
    settle_withheld(run.path)
    assert {p.name for p in folder.iterdir()} - model == {"run"}
    assert is_scrubbed(run.path) == scrubbed
    if not scrubbed:
        withhold_recorded(run, tokenizer, Withhold())
    assert {p.name for p in folder.iterdir()} - model == {"run"}
    assert all(c.holds for c in verify(load_run(run.path)))


def test_nobody_else_changes_the_run_meanwhile(tmp_path: Path, tokenizer: Path) -> None:
    run = make_good_run(tmp_path / "run")
    raw = run.path.with_name(".run.raw")
    raw.mkdir()
    with hold_directory(run.path):
        with pytest.raises(RunDirectoryError, match="another process records"):
            withhold_recorded(run, tokenizer, Withhold())
        with pytest.raises(RunDirectoryError, match="another process records"):
            settle_withheld(run.path)
        assert raw.exists()
    settle_withheld(tmp_path / "no such folder" / "run")
    assert not (tmp_path / "no such folder").exists()


def test_harvest_finishes_it_before_it_says_that_all_is_done(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    run = make_good_run(tmp_path / "made")
    _kill_at(monkeypatch, "the copy is renamed")
    with pytest.raises(_Killed):
        withhold_recorded(run, tokenizer, Withhold())
    monkeypatch.undo()
    (tmp_path / "mine.yaml").write_text("workload: {source: shared_prefix}\nwithhold: {pii: [email]}\n")
    result = cli("harvest", tmp_path / "mine.yaml", "--output", run.path, "--resume")
    assert result.returncode == 0, result.stderr
    assert "positions are withheld already" in result.stdout
    assert is_scrubbed(run.path)
    assert not list(run.path.parent.glob(".run*"))


@pytest.fixture
def segments(tmp_path: Path) -> tuple[Run, Run]:
    """Two segments of a server; a request is in flight at the border."""
    engine = FakeEngine(tmp_path / "live", privacy="ids", rows=True)
    engine.serve("a", [1, 6, 7, 8, 9], n=4)
    engine.prefill("b", [1, 2, 3])
    engine.decode("b", n=2)
    first = engine.flush()
    engine.decode("b", n=1)
    engine.end("b")
    second = engine.flush()
    engine.live.close()
    return load_run(first), load_run(second)


def test_of_requests_at_the_border_of_a_segment_all_is_withheld(
    segments: tuple[Run, Run], tokenizer: Path, tmp_path: Path, cli: Callable
) -> None:
    first, second = segments
    going_on, ended = (r.requests(interrupted=True).set_index("finish_reason")["rid"] for r in segments)
    said = cli("scrub", first.path, "--model", tokenizer, "--output", tmp_path / "first")
    assert said.returncode == 0, said.stderr
    assert "5\tunknown" in said.stdout
    assert "goes on in the next segment" in said.stdout
    after = load_run(tmp_path / "first")
    told = after.withheld()
    b = going_on["continues"]
    assert told[told["rid"] == b][["start", "end", "reason"]].to_numpy().tolist() == [[0, 5, "unknown"]]
    assert set(told[told["rid"] != b]["reason"]) == {"pii:email", NEIGHBOUR}
    spans = after.spans()
    rows = positions.expand(spans[spans["row_start"] >= 0])
    held = after.holds("hook_embed", rows["row"].to_numpy())
    assert set(rows["rid"][held]) == set(going_on) - {b}
    assert [c.violation for c in verify(after) if not c.holds] == []
    withhold(second, tmp_path / "second", tokenizer, Withhold())
    assert load_run(tmp_path / "second").withheld().empty  # here all of its tokens are known
    assert ended["length"] == b


def test_verify_names_a_row_whose_token_is_not_known(
    segments: tuple[Run, Run], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_probe.privacy import withhold as module

    tell = module.reasons_of
    monkeypatch.setattr(module, "reasons_of", lambda requests, vocabulary, rule, ends: tell(requests, vocabulary, rule))
    withhold(segments[0], tmp_path / "ledger", tokenizer, Withhold())
    monkeypatch.setattr(module, "_rows_gone", lambda *_a: np.empty(0, np.int64))
    withhold(segments[0], tmp_path / "rows", tokenizer, Withhold())
    for name in ("ledger", "rows"):
        found = {c.name: c.violation for c in verify(load_run(tmp_path / name)) if not c.holds}
        assert "position 0 has no known token, and is not withheld" in str(found["withheld"])


def test_positions_without_a_known_token_have_their_own_reason(tokenizer: Path) -> None:
    import pandas as pd

    # An interrupted one, one with a discarded step after its last token, one that nothing is known of.
    frame = pd.DataFrame({"rid": ["a", "b"], "prompt_ids": [[1, 2], [1, 6]], "output_ids": [None, [7, 8]]})
    told = reasons_of(frame, Vocabulary.load(tokenizer), Withhold(neighbours=2), {"a": 5, "b": 5, "c": 2})
    assert {rid: x.tolist() for rid, x in told.items()} == {
        "a": [None, None, "unknown", "unknown", "unknown"],
        "b": [NEIGHBOUR, *["pii:email"] * 3, "unknown"],
        "c": ["unknown", "unknown"],
    }
    asked = [("a", 1), ("a", 2), ("a", 5), ("d", 0)]  # the last two are beyond what the ledger has
    assert [_is_withheld(told, rid, p) for rid, p in asked] == [False, True, True, True]


def test_rows_of_an_interrupted_request_are_gone_where_its_tokens_are_not_known(
    tmp_path: Path, tokenizer: Path
) -> None:
    run = make_good_run(tmp_path / "run")
    path = run.path / "requests.parquet"
    frame = pq.read_table(path)
    outputs = [None if r["rid"] == "r000003" else r["output_ids"] for r in frame.to_pylist()]
    at = frame.column_names.index("output_ids")
    pq.write_table(frame.set_column(at, "output_ids", pa.array(outputs, frame.schema.field(at).type)), path)
    withhold(load_run(run.path), tmp_path / "out", tokenizer, Withhold())
    after = load_run(tmp_path / "out")
    spans = after.spans()
    rows = positions.expand(spans[(spans["row_start"] >= 0) & (spans["rid"] == "r000003")])
    held = after.holds("hook_embed", rows["row"].to_numpy())
    assert set(rows["position"]) == set(range(11))
    assert sorted(set(rows["position"][held])) == list(range(6))
    ended = after.engine_requests().set_index("rid")["output_ids"]["r000003"]
    assert set(ended) == {-1}


def test_a_segment_without_token_ids_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    from sglang_probe.run import seal

    run = make_good_run(tmp_path / "run")
    seal.close(run.path, {**run.manifest, "privacy": "hashes"})
    with pytest.raises(ConfigError, match=r"no token ids \(`privacy: hashes`\)"):
        withhold(load_run(run.path), tmp_path / "out", tokenizer, Withhold())


def test_no_file_of_the_copy_tells_what_is_withheld(tmp_path: Path, tokenizer: Path) -> None:
    """Everything that a request brings along: right answers, sampling parameters, a refusal; and the manifest."""
    from sglang_probe.run import seal

    run = make_good_run(tmp_path / "run")
    path = run.path / "requests.parquet"
    schema = pq.read_schema(path)
    records = pq.read_table(path).to_pylist()
    plain = {"max_new_tokens": 8, "stop_token_ids": [2], "stop": ["END"], "logit_bias": {"5": 1.0}}
    by_rid = {r["rid"]: r for r in records}
    by_rid["r000000"] |= {
        "continuation_ids": [20, MAIL[2]],
        "answer_ids": [MAIL[0]],
        "sampling_params": json.dumps(
            {
                **plain,
                "stop": ["END", "ann@example"],
                "regex": r"(ann@example\\.org|x)",
                "stop_token_ids": [2, MAIL[1]],
                "logit_bias": {"5": 1.0, str(MAIL[1]): 2.0},
            }
        ),
        "refusal": "cannot compile ann@example.org",
    }
    # Nothing of this one is withheld, and what it brings along is personal all the same.
    by_rid["r000003"] |= {"continuation_ids": [1, *MAIL, 9], "answer_ids": [20, 21], "sampling_params": "{}"}
    by_rid["r000001"] |= {"continuation_ids": [20, 21], "sampling_params": json.dumps(plain), "refusal": "too long"}
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path)
    manifest = {
        **run.manifest,
        "sampling": {**plain, "stop": "bob@example.org"},
        "refused": {"r000000": "ann@example.org"},
    }
    seal.close(run.path, manifest)
    withhold(load_run(run.path), tmp_path / "out", tokenizer, Withhold())
    after = load_run(tmp_path / "out")
    requests = after.requests(interrupted=True).set_index("rid")
    assert json.loads(requests["sampling_params"]["r000000"]) == {"max_new_tokens": 8}
    assert json.loads(requests["sampling_params"]["r000001"]) == plain
    assert requests["refusal"][["r000000", "r000001"]].tolist() == ["withheld", "too long"]
    assert requests["continuation_ids"][["r000000", "r000003"]].isna().all()
    assert [list(x) for x in requests["continuation_ids"][["r000001"]]] == [[20, 21]]
    assert requests["answer_ids"]["r000000"] is None
    assert list(requests["answer_ids"]["r000003"]) == [20, 21]
    assert after.manifest["sampling"] == {k: v for k, v in plain.items() if k != "stop"}
    for file in (p for p in after.path.rglob("*") if p.is_file()):
        if file.suffix != ".parquet":
            assert b"example" not in file.read_bytes(), file
            continue
        table = pq.read_table(file)
        for name, column in zip(table.column_names, table.columns, strict=True):
            assert "example" not in str(column.to_pylist()), (file, name)
            if name.endswith("_ids") or name == "token_id":
                there = {i for x in column.to_pylist() for i in ([x] if isinstance(x, int) else x or [])}
                assert not there & set(MAIL), (file, name)
    assert [c.violation for c in verify(after) if not c.holds] == []


def test_ids_that_nobody_can_place_are_gone() -> None:
    """Without a prompt's length, or of a request that nothing is known of."""
    from sglang_probe.privacy.withhold import _ids

    row = {"cached_tokens": 0, "retractions": 0, "finish_reason": "length", "output_len": 2, "output_ids": [8, 2]}
    rows = [{"rid": rid, "prompt_len": length, **row} for rid, length in (("a", 3), ("a", None), ("b", 3))]
    table = pa.Table.from_pylist(rows, schema=ENGINE_REQUESTS)
    own = {"a": np.array([False, True, True, True, False])}
    assert _ids(table, own, prompt=False)["output_ids"].to_pylist() == [[-1, 2], [-1, -1], [-1, -1]]
