"""Interventions and the prefix cache, in both directions: nobody is steered who did not ask, and nobody by halves.

One engine serves it all. That what is computed under interventions is right is asked of `transformers` in
test_vectors.py; what each safeguard is for, of the attack without it (`slow`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from tests.attack.steering import SAME, Outcome, attack, prepared, request
from tests.end_to_end.steering import POINTS, make_library

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("steering")]

PROMPT = [100 + 7 * i % 2900 for i in range(100)]
NEW = 8
UP: dict[str, Any] = {"vector": "up", "strength": 60}
LATER = {**UP, "phases": ["decode"]}

FIRST: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "steered": [UP],
    "plain again": [],
    "steered again": [UP],
    "steered otherwise": [{**UP, "strength": 61}],
    "last token": [{**UP, "prompt_window": [-1, None]}],
    "generation": [LATER],
    "from step 3": [{**LATER, "generation_window": [3, None]}],
    "steps 2 and 3": [{**LATER, "generation_window": [2, 4]}],
    "plain at last": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steering")
    make_library(folder / "library")
    return folder


UNUSED = [request(i, f"r{i}", PROMPT[i:], [], 12, temperature=float(i % 2)) for i in range(4)]
"""Greedy ones, and ones that are sampled with the engine's seed."""


@pytest.fixture(scope="module")
def without(folder: Path) -> Run:
    """An engine that never had a library."""
    with EngineHost() as host:
        return record([RunSpec("without", UNUSED)], prepared(None, 1), folder, host=host)["without"]


@pytest.fixture(scope="module")
def host(folder: Path, without: Run) -> Iterator[EngineHost]:
    """The engine of this file. What it does first is what the other one did: they draw the same random numbers."""
    with EngineHost() as host:
        record([RunSpec("unused", UNUSED)], prepared(folder / "library", 1), folder, host=host)
        yield host
        assert host.starts == 1


@pytest.fixture(scope="module")
def run(folder: Path, host: EngineHost) -> Run:
    """One prompt, plain and steered, one request after the other; then the first turns' texts as plain prompts."""
    one = prepared(folder / "library", 1)
    first = [request(i, name, PROMPT, steer, NEW) for i, (name, steer) in enumerate(FIRST.items())]
    outputs = _outputs(record([RunSpec("outputs", first)], one, folder, host=host)["outputs"])
    turns = [
        request(len(first) + i, f"after {name}", [*PROMPT, *outputs[name]], [], NEW)
        for i, name in enumerate(("steered", "generation"))
    ]
    return record([RunSpec("run", [*first, *turns])], one, folder, host=host)["run"]


@pytest.fixture(scope="module")
def alone(run: Run, folder: Path, host: EngineHost) -> Run:
    """The plain turns after a steered one, with nothing to reuse."""
    turns = [
        request(r.index, r.rid, [int(t) for t in r.prompt_ids], [], NEW)
        for r in run.requests().itertuples()
        if "after" in r.rid
    ]
    return record([RunSpec("alone", turns, Arm(cache="off"))], prepared(folder / "library", 1), folder, host=host)[
        "alone"
    ]


def _outputs(run: Run) -> dict[str, list[int]]:
    return {r.rid: [int(t) for t in r.output_ids] for r in run.requests().itertuples()}


def _reused(run: Run) -> dict[str, tuple[int, set[str]]]:
    """Of each request: positions that it reused, and of whom."""
    spans = run.spans()
    reused = spans[spans["status"] == "reused"]
    return {
        str(rid): (int(mine["end"].max()), set(mine["origin_rid"])) for rid, mine in reused.groupby("rid", sort=False)
    }


def test_every_invariant_holds_and_interventions_were_asked(run: Run, alone: Run) -> None:
    assert [str(c) for r in (run, alone) for c in verify(r) if not c.holds] == []
    (check,) = [c for c in verify(run) if c.name == "interventions"]
    assert check.covered > 3 * len(PROMPT)
    assert check.note is None


def _forwards(run: Run) -> dict[str, list[tuple[object, ...]]]:
    """Of each request, what it computed together with what. A request may come before the last step of the one before
    is over, which then takes a row of its first chunk: bits depend on that, and on nothing of ours."""
    spans = run.spans()
    columns = ["start", "end", "mode", "requests", "slots"]
    both = spans[spans["phase"] == "prefill"].merge(run.forwards(), on="forward_id")
    return {str(rid): [*mine[columns].itertuples(index=False, name=None)] for rid, mine in both.groupby("rid")}


def test_a_library_that_nobody_uses_changes_no_bit(host: EngineHost, folder: Path, without: Run) -> None:
    unused = load_run(folder / "unused")
    assert set(unused.manifest["steer"]["vectors"]) == {"up", "late", "feature", "fires"}
    outputs = _outputs(without)
    assert _outputs(unused) == outputs
    theirs, ours = _forwards(without), _forwards(unused)
    alike = [rid for rid in outputs if ours[rid] == theirs[rid]]
    assert "r0" in alike  # before which nobody came
    for point in ("hook_embed", *POINTS):
        for rid in alike:
            one, other = (run.activations(rid, point) for run in (without, unused))
            assert len(one) == len(other) > 0
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (rid, point)


def test_what_lies_before_the_onset_is_anybodys_and_what_does_not_is_of_equal_histories(run: Run) -> None:
    assert _reused(run) == {
        "plain again": (99, {"plain"}),
        "steered again": (99, {"steered"}),
        "last token": (99, {"plain"}),
        "generation": (99, {"plain"}),
        "from step 3": (99, {"plain"}),
        "steps 2 and 3": (99, {"plain"}),
        "plain at last": (99, {"plain"}),
        # The prompt, and where nobody steered the output is the same as the plain one's.
        "after steered": (len(PROMPT) + _common(run, "steered"), {"plain"}),
        "after generation": (len(PROMPT) + _common(run, "generation"), {"plain"}),
    }


def _common(run: Run, name: str) -> int:
    """Output tokens that a steered request has in common with the plain one, of those that the plain one computed."""
    outputs = _outputs(run)
    pairs = list(zip(outputs["plain"][: NEW - 1], outputs[name], strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def test_plain_requests_have_the_same_bits_before_and_after_steered_ones(run: Run) -> None:
    outputs = _outputs(run)
    assert outputs["plain"] == outputs["plain again"] == outputs["plain at last"]
    assert outputs["plain"] != outputs["steered"]
    for point in POINTS:
        again, last = (run.activations(rid, point)[99:] for rid in ("plain again", "plain at last"))
        assert (again == last).all(), point


def test_a_steered_request_is_the_same_whether_or_not_it_reuses_its_own_history(run: Run) -> None:
    outputs = _outputs(run)
    assert outputs["steered"] == outputs["steered again"]
    for point in POINTS:
        one, other = (run.activations(rid, point, intervened=True)[99:] for rid in ("steered", "steered again"))
        assert _error(one, other) < SAME


def test_step_k_changes_the_row_of_the_k_th_generated_token_and_no_earlier_one(run: Run) -> None:
    """The window [3, ...) leaves steps 1 and 2 alone: output 3 is the last that nothing changed."""
    changed = {"generation": 1, "from step 3": 3, "steps 2 and 3": 2}
    outputs = _outputs(run)
    for name, step in changed.items():
        assert outputs[name][:step] == outputs["plain"][:step]
        spans = run.spans()
        marked = spans[(spans["rid"] == name) & spans["intervention"].notna()]
        assert int(marked["start"].min()) == len(PROMPT) + step - 1
        assert run.interventions().set_index("rid").at[name, "onset"] == len(PROMPT) + step - 1
        plain, other = (
            run.activations(rid, POINTS[1], intervened=True)[len(PROMPT) :][: NEW - 1] for rid in ("plain again", name)
        )
        # Not to the bit: the plain one attends to the tree's entry of position 99, the private one to its own.
        if step > 1:
            assert _error(plain[: step - 1], other[: step - 1]) < 1e-5
        assert _error(plain[step - 1 : step], other[step - 1 : step]) > 0.1


def test_plain_turns_that_contain_steered_output_compute_it_again(run: Run, alone: Run) -> None:
    together, by_themselves = _outputs(run), _outputs(alone)
    for rid in by_themselves:
        assert together[rid] == by_themselves[rid]
        n = len(PROMPT) + NEW
        for point in POINTS:
            assert _error(run.activations(rid, point)[: n + NEW - 1], alone.activations(rid, point)) < SAME


def _error(a: Any, b: Any) -> float:
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def test_rows_under_interventions_are_left_out_of_a_dataset_unless_asked(run: Run) -> None:
    tokens = run.tokens()
    held = tokens[(tokens["row"] >= 0) & (tokens["phase"] != "overshoot")]
    plain = int(held["intervention"].isna().sum())
    assert 0 < plain < len(held)

    def rows(**options: Any) -> int:
        return sum(len(b) for b in run.iter_batches(POINTS[1], batch_size=64, **options))

    assert rows() == plain
    assert rows(intervened=True) == len(held)
    assert rows(where="rid == 'steered'") == 0
    with pytest.raises(ProbeError, match="107 computed under an intervention"):
        run.activations("steered", POINTS[1])
    assert run.activations("steered", POINTS[1], missing="nan").isnan().all()
    assert len(run.activations("generation", POINTS[1], missing="nan")[:100].isnan().nonzero()) == 0


def test_an_arm_steers_every_request_and_the_manifest_says_by_what(folder: Path, host: EngineHost) -> None:
    plain = [request(0, "a", PROMPT[:40], [], 4), request(1, "b", PROMPT[:40], [LATER], 4)]
    arm = Arm.model_validate({"steer": [{"vector": "late", "op": "project_out"}]})
    found = record([RunSpec("arm", plain, arm)], prepared(folder / "library", 1), folder, host=host)["arm"]
    assert [str(c) for c in verify(found) if not c.holds] == []
    under = found.interventions().set_index("rid")
    assert [s["vector"] for s in json.loads(under.at["b", "spec"])] == ["up", "late"]
    assert [s["vector"] for s in json.loads(under.at["a", "spec"])] == ["late"]
    assert found.manifest["policy"]["steer"][0]["op"] == "project_out"
    assert set(found.manifest["steer"]["vectors"]) == {"up", "late", "feature", "fires"}


def test_unknown_names_are_refused_at_preparation_and_by_the_engine_with_the_key(
    folder: Path, host: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = request(0, "wrong", PROMPT[:20], [{"vector": "down", "strength": 1}], 4)
    with pytest.raises(ConfigError, match=r"custom_params.probe.steer\[0\].vector: `down` is not in the library"):
        record([RunSpec("wrong", [wrong])], prepared(folder / "library", 1), folder, host=host)
    for module in ("job", "experiment"):  # as if only the engine could tell
        monkeypatch.setattr(f"sglang_probe.harvest.{module}.check_requests", lambda *_: None)
    served = request(1, "served", PROMPT[:20], [UP], 4)
    found = record([RunSpec("refused", [wrong, served])], prepared(folder / "library", 1), folder, host=host)["refused"]
    assert "steer[0].vector: `down` is not in the library" in found.manifest["refused"]["wrong"]
    assert found.requests().set_index("rid").at["served", "finish_reason"] == "length"
    assert [str(c) for c in verify(found) if not c.holds] == []


@pytest.fixture(scope="module")
def over_budget(folder: Path, host: EngineHost) -> dict[str, Run]:
    """A budget that any operation exceeds: a picosecond a forward. Steered ones fill the window of 15 forwards."""
    requests = [request(i, f"r{i}", PROMPT[:40], steer, NEW) for i, steer in enumerate([[UP], [UP], [UP], [LATER], []])]
    found = {}
    for action in ("off", "refuse"):
        ours = prepared(folder / "library", 1, budget_ms=1e-9, budget_rest=1e6, over_budget=action)
        found[action] = record([RunSpec(action, requests)], ours, folder, host=host)[action]
    return found


def test_over_budget_new_requests_are_refused_or_go_without_and_the_ledger_says_which(
    over_budget: dict[str, Run],
) -> None:
    for action, run in over_budget.items():
        checks = {c.name: c for c in verify(run)}
        assert [str(c) for c in checks.values() if not c.holds] == []
        assert checks["interventions"].note is None
        assert set(run.interventions()["rid"]) == {"r0", "r1"}
        assert run.tokens().query("rid in ('r2', 'r3', 'r4')")["intervention"].isna().all()
        assert run.manifest["steer"]["over_budget"] == action
    off, refuse = over_budget["off"], over_budget["refuse"]
    outputs = _outputs(off)
    assert outputs["r2"] == outputs["r3"] == outputs["r4"] != outputs["r1"] == outputs["r0"]
    assert list(off.budget()["event"]) == ["exceeded", "unsteered", "unsteered"]
    assert list(off.budget()["rid"])[1:] == ["r2", "r3"]
    assert rows_of_dataset(off, "r2") > 0
    # r1 was running when the budget was exceeded, and went on to its end.
    last = off.tokens().query("rid == 'r1' and intervention.notna()")["position"].max()
    assert last >= 40 + NEW - 2
    assert list(refuse.budget()["event"]) == ["exceeded"]
    assert set(refuse.manifest["refused"]) == {"r2", "r3"}
    assert "steer: interventions cost more than 1e-09 ms a forward" in refuse.manifest["refused"]["r2"]
    assert _outputs(refuse)["r4"] == outputs["r4"]


def rows_of_dataset(run: Run, rid: str) -> int:
    return sum(len(b) for b in run.iter_batches(POINTS[1], batch_size=64, where=f"rid == '{rid}'"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: rows[1:], "and it was not exceeded"),
        (lambda rows: [{**rows[0], "milliseconds": 0.0}, *rows[1:]], "and 1e-09 are allowed"),
        (lambda rows: rows[:2], "it asked for"),
        (lambda rows: [*rows[:2], {**rows[2], "rid": "r1"}], "is in the table `interventions`"),
        (lambda rows: [rows[0], rows[0], *rows[1:]], "it was exceeded already"),
    ],
)
def test_a_damaged_account_of_the_budget_is_noticed(
    over_budget: dict[str, Run], damage: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = over_budget["off"]
    rows = pd.DataFrame(damage(run.budget().to_dict("records")))
    monkeypatch.setattr(Run, "budget", lambda _self: rows)
    assert any(said in str(c.violation) for c in verify(run) if not c.holds)


def test_random_traffic_computes_together_what_it_computes_alone(folder: Path, host: EngineHost) -> None:
    outcome = attack(folder, host, seed=1, requests=36)
    assert_isolated(outcome)


def assert_isolated(outcome: Outcome) -> None:
    assert outcome.wrong == []
    assert outcome.positions > 500
    assert outcome.plain_positions > 200
    assert outcome.reused_steered > 50
    assert outcome.worst < SAME


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 23))
def test_long_attack(seed: int) -> None:
    said = _attack(seed, 150)
    assert said["wrong"] == 0, said
    assert said["reused_steered"] > 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "sabotage",
    [
        "steered without a namespace",
        "steered publish what is private",
        "steered read past their onset",
        "one history for all lengths",
    ],
)
def test_without_a_safeguard_it_is_noticed(sabotage: str) -> None:
    assert _attack(1, 60, sabotage)["wrong"] > 0


def _attack(seed: int, requests: int, sabotage: str = "") -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.attack.steering", "--seed", str(seed), "--requests", str(requests)]
    done = subprocess.run(
        [*command, "--sabotage", sabotage], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("STEERED ")] or [done.stdout + done.stderr]
    return dict(json.loads(line.removeprefix("STEERED ")))
