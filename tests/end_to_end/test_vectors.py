"""Vectors in a real engine: requests under interventions computed again by `transformers`, and scores in the step.

One engine, fp32, with small chunks, mixed batches and shared prefixes, serves both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_probe import Experiment, load_run
from sglang_probe.paths import shipped
from sglang_probe.run import journal
from sglang_probe.run.run import Run
from sglang_probe.run.scores import WEIGHTS_FILE
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering import make
from sglang_probe.steering.library import Library, MadeBy, write
from sglang_probe.verify.reference import check_against_transformers, compare
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import Request, SegmentSpan
from tests.end_to_end.steering import MODEL, POINTS, WIDTH, make_library

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("steering")]

PROMPT, NEW = 90, 12


def _gated(probe: str, **entry: Any) -> dict[str, Any]:
    gate = {"by": "probe", "probe": probe}
    return {"vector": "up", "strength": 4.0, "phases": ["decode"], "gate": gate, **entry}


STEERS: list[list[dict[str, Any]]] = [
    [],
    [{"vector": "up", "strength": 3.0}],
    [{"vector": "up", "strength": 0.5, "unit": "mean_norm", "phases": ["decode"], "generation_window": [3, 8]}],
    [],
    [{"vector": "late", "op": "project_out", "prompt_window": [10, -2], "phases": ["prefill"]}],
    [{"vector": "feature", "op": "clamp", "strength": 1.0, "unit": "p99"}],
    [{"vector": "feature", "op": "ablate_feature", "exclude": [0]}, {"vector": "late", "strength": 2.0}],
    [{"vector": "late", "op": "cap", "strength": 0.5}, {"vector": "up", "strength": 4.0, "prompt_window": [-1, None]}],
    [],
    [{"vector": "feature", "strength": 2.0, "gate": {"by": "feature"}}],
    [{"vector": "whole", "op": "splice", "prompt_window": [5, None]}],
    [{"vector": "whole", "op": "splice", "phases": ["decode"]}],
    [{"vector": "whole", "op": "splice", "strength": 0.5, "phases": ["prefill"], "exclude": [0]}],
    [{"vector": "whole", "op": "splice", "random_error": 3, "prompt_window": [40, None]}],
    [{"vector": "up", "strength": 2.0}, {"vector": "whole", "op": "splice", "random_error": 4, "phases": ["decode"]}],
    *([_gated(probe)] for probe in ("code", "digits", "deep", "fires", "deep", "code")),
    [_gated("digits", op="clamp"), {"vector": "up", "strength": 3.0, "prompt_window": [60, None]}, _gated("digits")],
    [
        _gated("deep", vector="late"),
        {"vector": "late", "strength": 2, "phases": ["decode"], "generation_window": [4, 6]},
    ],
]
GATED = [f"r{i}" for i, steer in enumerate(STEERS) if any("probe" in s.get("gate", {}) for s in steer)]
SCORES = ["blocks.1.hook_scores", "blocks.3.hook_scores"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Two directions, a feature and an SAE to intervene with, and probes of layers 1 and 3."""
    folder = tmp_path_factory.mktemp("vectors") / "library"
    make_library(folder)
    generator = torch.Generator().manual_seed(7)
    for name, layer in (("code", 1), ("digits", 1), ("deep", 3)):
        write(
            folder,
            {"vector": torch.randn(WIDTH, generator=generator), "threshold": torch.tensor(0.0)},
            name=name,
            kind="probe",
            hook_point=POINTS[layer],
            model="probe-text",
            model_weight_hash=weight_hash_of_folder(MODEL),
            made_by=MadeBy(command="test"),
        )
    make.whole_sae(make.Target(folder, "whole"), shipped("models/sae-probe-text/seed-0"))
    return Library.open(folder)


@pytest.fixture(scope="module")
def run(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Run:
    rng = np.random.default_rng(0)
    shared = rng.integers(10, 1000, 50).tolist()
    requests = []
    for i, steer in enumerate(STEERS):
        ids = (*shared, *rng.integers(10, 1000, PROMPT - 50 + i).tolist())
        sampling: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
        if steer:
            sampling["custom_params"] = {"probe": {"steer": steer}}
        requests.append(Request(i, f"r{i}", ids, (SegmentSpan("prompt", 0, len(ids)),), None, sampling))
    with Experiment(
        model="probe-text",
        dtype="float32",
        requests=requests,
        hook_points=["hook_embed", *POINTS, *SCORES],
        steer={"library": str(library.folder)},
        scores={"library": str(library.folder)},
        server={"chunked_prefill_size": 64, "enable_mixed_chunk": True},
        concurrency=4,
    ) as experiment:
        return experiment.record(tmp_path_factory.mktemp("runs") / "steered")


def test_every_invariant_holds(run: Run) -> None:
    checks = verify(run)
    assert [str(c) for c in checks if not c.holds] == []
    of = {c.name: c for c in checks}
    assert of["scores"].covered == run.row_count() * 3
    assert of["scores"].note is None  # every one was compared with its row
    assert of["interventions"].covered > 0
    assert of["interventions"].note is None
    assert of["gates"].covered == len(GATED)
    assert (run.spans()["status"] == "reused").any()
    assert (run.forwards()["mode"] == "mixed").any()


def test_requests_under_interventions_are_those_of_transformers(run: Run, library: Library) -> None:
    found = compare(run, str(MODEL), requests=len(STEERS), vectors=list(library.values()))
    assert found.intervened == len(run.interventions()) > len(STEERS) / 2
    assert found.unknown == []
    assert found.undecided < run.row_count() / 4
    assert set(found.by_hook_point) == {"hook_embed", *POINTS, *SCORES}
    worst = {h: float(e.max()) for h, e in found.by_hook_point.items()}
    print(worst, found.undecided, run.row_count())
    assert max(worst.values()) < 1e-4
    assert all(len(e) == run.row_count() - found.undecided for e in found.by_hook_point.values())


def test_the_prompts_last_row_opens_a_gate_or_not_and_the_ledger_says_which(run: Run, library: Library) -> None:
    gates = run.gates().set_index("rid")
    assert list(gates.index) == GATED
    assert set(gates["opened"]) == {True, False}
    prompt_lens = run.requests().set_index("rid")["prompt_len"]
    tokens = run.tokens().set_index(["rid", "position"])
    for rid, g in gates.iterrows():
        assert g["position"] == prompt_lens[rid] - 1
        x = run.rows(g["hook_point"], [int(tokens.at[(rid, g["position"]), "row"])])[0].double()
        w = library[g["probe"]].vector.double()
        assert abs(float(x @ w) - g["score"]) < 1e-6 * float(x.norm() * w.norm())
        assert g["opened"] == (g["score"] > g["threshold"] == 0.0)
    # Prompts are of several chunks, others' tokens decode in the same forward, and most is reused.
    spans = run.spans()
    last = spans[spans["rid"].isin(GATED) & spans["forward_id"].isin(gates["forward_id"])]
    assert (last["chunk"] > 0).any()
    assert set(run.forwards().set_index("forward_id").loc[gates["forward_id"], "mode"]) >= {"mixed"}
    assert set(spans[(spans["status"] == "reused") & spans["intervention"].isna()]["rid"]) & set(GATED)


def test_positions_that_a_closed_gate_left_alone_are_in_the_dataset_and_others_are_not(run: Run) -> None:
    gates = run.gates().set_index("rid")
    tokens = run.tokens()
    tokens = tokens[tokens["phase"] != "overshoot"]
    marked = tokens[tokens["intervention"].notna()].groupby("rid")["position"].min()
    lens = run.requests().set_index("rid")["prompt_len"]
    alone = [rid for rid in GATED if len(STEERS[int(rid[1:])]) == 1]
    assert {gates.at[rid, "opened"] for rid in alone} == {True, False}
    for rid in alone:
        rows = sum(len(b) for b in run.iter_batches(POINTS[1], batch_size=64, where=f"rid == '{rid}'"))
        held = int((tokens["rid"] == rid).sum() - (tokens[tokens["rid"] == rid]["row"] < 0).sum())
        if gates.at[rid, "opened"]:
            assert marked[rid] == lens[rid]
            assert rows == held - (NEW - 1)
        else:
            assert rid not in marked
            assert rid not in set(run.interventions()["rid"])
            assert rows == held


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("opened", "at a score of"),
        ("score", "and the row has"),
        ("position", "its gate was decided on position"),
        ("forward_id", "and its row was computed in"),
        ("missing", "and has no decision"),
        ("spec", "has the hash"),
        ("unasked", "it asked for no gate, and has a decision"),
    ],
)
def test_a_damaged_decision_is_noticed(damage: str, said: str, run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    gates = run.gates()
    # By a probe whose scores are written; and one by another, given to a request that computed its last row.
    rid = gates.loc[(gates["probe"] == "fires") if damage == "unasked" else (gates["probe"] == "code"), "rid"].iloc[0]
    plain = run.spans().query("rid == 'r0' and phase == 'prefill'").iloc[-1]
    for path in sorted((copy / "ledger").glob("gates-*.parquet")):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["rid"] == rid:
                if damage == "unasked":
                    row |= {"rid": "r0", "position": plain["end"] - 1, "forward_id": plain["forward_id"]}
                elif damage == "spec":
                    row["intervention"] = "0" * 16
                elif damage == "opened":
                    row["opened"] = not row["opened"]
                elif damage == "score":
                    row["score"] *= 1.5
                elif damage != "missing":
                    row[damage] += 1
        if damage == "missing":
            rows = [r for r in rows if r["rid"] != rid]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    _hash_anew(copy)
    broken = [c for c in verify(load_run(copy)) if not c.holds]
    assert any(c.name == "gates" and said in str(c.violation) for c in broken), [str(c) for c in broken]


def test_another_vector_is_noticed(run: Run, library: Library, tmp_path: Path) -> None:
    """Each vector in its turn is 1 % longer or turned by a little, under the same hash."""
    assert check_against_transformers(run, str(MODEL), requests=len(STEERS), vectors=list(library.values())).holds
    for name in ("up", "late", "feature", "whole"):
        vectors = []
        for v in library.values():
            if v.name == name:
                longer = torch.where(torch.arange(WIDTH) % 2 == 0, 1.02, 1.0)
                tensors = {n: t * longer if n == "vector" else t for n, t in v.tensors.items()}
                sae = None if v.sae is None else replace(v.sae, W_dec=v.sae.W_dec * longer)
                changed = type(v)(v.card, tensors, sae)
                changed.__dict__["hash"] = v.hash
                v = changed
            vectors.append(v)
        check = check_against_transformers(run, str(MODEL), requests=len(STEERS), vectors=vectors)
        assert check.violation is not None, name


def test_without_the_library_it_is_said_what_was_left_out(run: Run) -> None:
    check = check_against_transformers(run, str(MODEL), requests=len(STEERS))
    assert check.holds
    assert check.note is not None
    under = set(run.interventions()["rid"])
    assert f"{len(under)} requests under interventions were not compared (r1 first): give the library" in check.note
    plain = [f"r{i}" for i in range(len(STEERS)) if f"r{i}" not in under]
    own = run.tokens()
    assert check.covered == int((own["rid"].isin(plain) & (own["row"] >= 0)).sum()) * len(run.hook_points)


def test_scores_are_read_with_their_names(run: Run, library: Library) -> None:
    scores = run.scores()
    assert list(scores.columns[-3:]) == ["code", "digits", "deep"]
    tokens = run.tokens()
    tokens = tokens[(tokens["phase"] != "overshoot") & (tokens["source_row"] >= 0)].reset_index(drop=True)
    assert (scores[["rid", "position"]] == tokens[["rid", "position"]]).all(axis=None)
    for name, point in (("code", POINTS[1]), ("digits", POINTS[1]), ("deep", POINTS[3])):
        x = run.rows(point, tokens["source_row"].to_numpy()).double()
        w = library[name].vector.double()
        error = (x @ w - torch.tensor(scores[name].to_numpy(), dtype=torch.float64)).abs() / (x.norm(dim=1) * w.norm())
        assert float(error.max()) < 1e-6
    assert scores["intervention"].notna().any()


@pytest.mark.parametrize("damage", ["swapped rows", "another vector", "not finite", "a column less", "no weights"])
def test_damaged_scores_are_noticed(damage: str, run: Run, tmp_path: Path) -> None:
    """Damage under hashes that were made anew, as a careless tool would."""
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    file = next((copy / "rows" / SCORES[0]).glob("*.safetensors"))
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "swapped rows": lambda x: x[torch.cat([torch.tensor([1, 0]), torch.arange(2, len(x))])],
        "not finite": lambda x: x.index_fill(0, torch.tensor([3]), float("nan")),
        "a column less": lambda x: x[:, :1],
    }
    if damage in changes:
        tensors = load_file(file)
        save_file({**tensors, "rows": changes[damage](tensors["rows"]).contiguous()}, file)
    elif damage == "another vector":
        weights = load_file(copy / WEIGHTS_FILE)
        save_file({**weights, "code": weights["code"] + 0.01}, copy / WEIGHTS_FILE)
    else:
        (copy / WEIGHTS_FILE).unlink()
    _hash_anew(copy)
    found = {c.name: c for c in verify(load_run(copy))}
    if damage == "no weights":
        assert found["scores"].note is not None
        assert "none was compared" in found["scores"].note
    else:
        assert not found["scores"].holds


def _hash_anew(run: Path) -> None:
    """Journal, manifest and seal as if the files had been written like this."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    for part in lines:
        part["files"] = {f: journal.sha256(run / f) for f in part["files"]}
    (run / "journal.jsonl").write_text("".join(json.dumps(p) + "\n" for p in lines))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"] = {f: d for part in lines for f, d in part["files"].items()}
    (run / "manifest.json").write_text(json.dumps(manifest))
    sealed = json.loads((run / "seal.json").read_text())["files"]
    files = {name: journal.sha256(run / name) for name in sealed if (run / name).exists()}
    (run / "seal.json").write_text(json.dumps({"files": files}))
