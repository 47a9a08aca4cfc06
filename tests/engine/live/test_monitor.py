"""A live monitor in front of the real recording and its writers: what it says is what is said of the recorded run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.engine.ledger.facts import Commit, ForwardPlan, Watched
from sglang_probe.engine.live.monitor import DRIFT_LOG, LiveMonitor
from sglang_probe.errors import ConfigError
from sglang_probe.monitor import make
from sglang_probe.monitor.alarms import alarms
from sglang_probe.monitor.config import MonitorConfig
from sglang_probe.monitor.make import from_monitored
from sglang_probe.monitor.profile import profile
from sglang_probe.monitor.reading import Reading
from sglang_probe.monitor.sampling import ByEntropy, Sampling
from sglang_probe.monitor.stored import StoredProfile, Watch, read_profile, write_profile
from sglang_probe.monitor.trajectories import Trajectories, read_monitored
from sglang_probe.run.run import load_run
from tests.engine.live.conftest import FakeEngine, checked, violations

WIDTH = 6
POINT = "blocks.0.hook_resid_post"
VECTOR = torch.arange(WIDTH).float()


def _reading() -> Reading:
    return Reading(vectors={"along": VECTOR})


def _watch(**fields: Any) -> Watch:
    told = {"vectors": {"along": "0" * 64}, "columns": list(_reading().names), **fields}
    return Watch(hook_point=POINT, sampling=Sampling(every=2), **told)


def _rows(rng: np.random.Generator, n: int, level: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(level + 0.3 * rng.standard_normal((n, WIDTH))).float()


def _usual(requests: int, seed: int, rows: int = 2) -> Trajectories:
    rng = np.random.default_rng(seed)
    x = torch.cat([_rows(rng, rows, rng.standard_normal(WIDTH)) for _ in range(requests)])
    names = [f"u{i}" for i in range(requests)]
    frame = pd.DataFrame({"run": 0, "rid": names, "family": names, "rows": rows})
    of = np.repeat(np.arange(requests), rows)
    return Trajectories(_reading().names, _reading().columns(x), of, frame, x)


@pytest.fixture
def stored(tmp_path: Path) -> StoredProfile:
    usual, _, _ = profile(_usual(200, seed=1))
    write_profile(tmp_path / "p", StoredProfile(usual, _watch(), {"along": VECTOR}, "m", "w", [{"name": "r"}]))
    return read_profile(tmp_path / "p")


def _monitor(stored: StoredProfile | None, watch: Watch | None = None, **config: Any) -> LiveMonitor:
    given = MonitorConfig(hook_point=POINT, **{"share": 0.05, "rate": 0.005, **config})
    return LiveMonitor(given, watch or (_watch() if stored is None else stored.watch), _reading(), stored)


def _plant(engine: FakeEngine, shift_from: int | None, seed: int = 5) -> None:
    """Rows of request number n are usual, and from `shift_from` on all of their numbers are higher by 2."""
    rng = np.random.default_rng(seed)
    levels: dict[str, np.ndarray] = {}

    def watch(plan: ForwardPlan) -> Watched | None:
        at = [i for i in range(len(plan.rids)) if (plan.starts[i] - plan.prompt_lens[i]) % 2 == 0]
        if not at:
            return None
        for i in at:
            if plan.rids[i] not in levels:
                drifted = shift_from is not None and int(plan.rids[i][1:]) >= shift_from
                levels[plan.rids[i]] = rng.standard_normal(WIDTH) + 2.0 * drifted
        x = torch.cat([_rows(rng, 1, levels[plan.rids[i]]) for i in at])
        of = [[getattr(plan, name)[i] for i in at] for name in ("rids", "attempts", "starts")]
        return Watched(*of, np.full(len(at), 0.5), None, x, plan.forward_id, plan.weights)

    engine.watch = watch


def _serve(engine: FakeEngine, numbers: range) -> None:
    for n in numbers:
        engine.serve(f"r{n}", list(range(n % 50, n % 50 + 4)), n=6)


def _settled(monitor: LiveMonitor, wait: Callable, requests: int) -> None:
    wait(lambda: monitor.requests >= requests or monitor.off is not None)
    assert monitor.off is None


def test_a_planted_drift_alarms_in_its_segment_and_a_usual_stream_does_not(
    make_engine: Callable[..., FakeEngine], stored: StoredProfile, wait: Callable, tmp_path: Path
) -> None:
    monitor = _monitor(stored)
    engine = make_engine(monitor=monitor, privacy="none")
    _plant(engine, shift_from=60)
    _serve(engine, range(60))
    first = engine.flush()
    assert monitor.alerts()["drift"] == {}
    _serve(engine, range(60, 120))
    second = engine.flush()
    told = monitor.alerts()
    assert told["requests"] == 120
    assert told["drift"]
    assert min(told["drift"].values()) >= 60
    assert {e["event"] for e in told["events"]} == {"retrain"}
    assert told["events"][0]["evidence"]["detector"] >= 1
    lines = [load_run(p).manifest["monitor"]["drift_log"] for p in (first, second)]
    assert [x["drift"] for x in lines] == [False, True]
    assert [x["requests"] for x in lines] == [60, 60]
    assert lines[1]["alarms"] > 10 >= lines[0]["alarms"]
    assert lines[1]["means"]["along"] > lines[0]["means"]["along"] + 10
    log = [json.loads(x) for x in (tmp_path / "live" / DRIFT_LOG).read_text().splitlines()]
    assert [x["segment"] for x in log if "segment" in x] == [first.name, second.name]
    assert any(x.get("event") == "retrain" for x in log)
    for path in (first, second):
        run, checks = checked(path)
        assert not violations(checks)
        assert len(run.monitored()) == 60 * 3


def test_what_is_said_while_serving_is_what_is_said_of_the_recorded_run(
    make_engine: Callable[..., FakeEngine], stored: StoredProfile, wait: Callable
) -> None:
    monitor = _monitor(stored)
    engine = make_engine(monitor=monitor)
    _plant(engine, shift_from=20)
    _serve(engine, range(20))
    engine.prefill("r20", [1, 2, 3])  # in flight while the segment changes
    engine.decode("r20", n=2)
    first = engine.flush()
    engine.decode("r20", n=2)
    engine.end("r20")
    _serve(engine, range(21, 40))
    second = engine.flush()
    _settled(monitor, wait, 40)
    recorded = read_monitored([load_run(first), load_run(second)])
    assert recorded.frame["rid"].tolist() == [f"r{n}" for n in range(40)]
    # The table has no rows, and so no distances: without them both say the same.
    kept = [s for s in stored.profile.statistics if s != "mahalanobis"]
    usual = stored.profile
    plain = type(usual)(usual.centre[kept], usual.spread[kept], usual.reference[kept], usual.quantiles, None)
    live = _monitor(StoredProfile(plain, stored.watch, stored.vectors, "m", "w", []))
    for order, rid in enumerate(recorded.frame["rid"]):
        at = np.flatnonzero(recorded.of_N == order)
        watched = Watched([rid] * len(at), [0] * len(at), [0] * len(at), np.full(len(at), 0.5), None, None, 0, 0)
        live._reading = type("Told", (), {"columns": lambda _s, _x, at=at: recorded.values_NK[at]})()  # type: ignore[assignment]
        live.read(Commit(watched=watched, requests=[(rid, 4, 6, 0, 0, "length", None)], order=order), "s")
    found = alarms(plain.scores(recorded), plain.reference, share=0.05, rate=0.005)
    assert live.requests == 40
    assert live.alarms == int(found.trajectories["alarm"].sum()) > 5
    since = found.drift.dropna().set_index("statistic")["first_alarm"].to_dict()
    assert live.status()["drift"] == {k: int(v) for k, v in since.items()}


def test_commits_are_judged_in_the_order_in_which_they_were_handed_over(stored: StoredProfile) -> None:
    rng = np.random.default_rng(0)

    def commits() -> list[Commit]:
        found = []
        for n in range(40):
            x = _rows(np.random.default_rng(n), 2, np.full(WIDTH, 0.1 * n))
            watched = Watched([f"r{n}"] * 2, [0, 0], [5, 7], np.full(2, 0.5), None, x, n, 0)
            end = (f"r{n}", 4, 6, 0, 0, "length", None)
            found.append(Commit(watched=watched, requests=[end], order=n))
        return found

    straight, mixed = _monitor(stored), _monitor(stored)
    for commit in commits():
        straight.read(commit, "a")
    for i in rng.permutation(40):
        mixed.read(commits()[i], "a")
    assert straight.status() == mixed.status()
    assert straight.requests == 40
    assert [a["rid"] for a in straight.alerts()["alerts"]] == [a["rid"] for a in mixed.alerts()["alerts"]]


def test_a_commit_that_was_lost_with_its_writer_is_not_waited_for_for_ever(
    stored: StoredProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_probe.engine.live.monitor._MOST_EARLY", 5)
    monitor = _monitor(stored)
    for n in range(1, 12):  # 0 never comes
        x = _rows(np.random.default_rng(n), 1, np.zeros(WIDTH))
        end = (f"r{n}", 4, 6, 0, 0, "length", None)
        watched = Watched([f"r{n}"], [0], [5], np.ones(1), None, x, n, 0)
        monitor.read(Commit(watched=watched, requests=[end], order=n), "s")
        assert monitor.requests == (0 if n < 6 else n)
        assert monitor.status()["waiting"] == (n if n < 6 else 0)
    assert monitor.status()["commits_lost"] == 1
    assert monitor.alerts()["events"][0]["event"] == "gap"


def test_a_fault_of_the_monitor_costs_the_monitor_and_nothing_else(
    make_engine: Callable[..., FakeEngine], stored: StoredProfile, wait: Callable
) -> None:
    monitor = _monitor(stored)
    engine = make_engine(monitor=monitor)
    engine.watch = lambda plan: Watched(["r0"], [0], [1], np.ones(1), None, torch.zeros((1, 2)), plan.forward_id, 0)
    _serve(engine, range(3))
    run, checks = checked(engine.flush())
    assert not violations(checks)
    assert len(run.requests()) == 3
    assert "it failed" in str(monitor.off)
    assert engine.live.stops.fault is None
    assert monitor.alerts()["events"][-1]["event"] == "off"


def _one(rid: str, order: int, x: torch.Tensor, *, weights: int = 0, ends: bool = True) -> Commit:
    end = (rid, 4, 6, 0, 0, "length", None)
    n = len(x)
    watched = Watched([rid] * n, [0] * n, list(range(4, 4 + n)), np.ones(n), None, x, order, weights)
    return Commit(watched=watched, requests=[end] if ends else [], order=order)


def test_rows_that_are_not_finite_are_counted_and_an_event_of_their_segment(stored: StoredProfile) -> None:
    monitor = _monitor(stored)
    for order in range(3):
        monitor.read(_one(f"r{order}", order, torch.full((2, WIDTH), float("nan"))), "s")
    assert (monitor.requests, monitor.alarms, monitor.off) == (3, 0, None)
    told = monitor.alerts()
    assert told["not_finite"] == 6
    assert [(e["event"], e["evidence"]["rid"]) for e in told["events"]] == [("not finite", "r0")]
    assert monitor.line("s")["not_finite"] == 6


@pytest.mark.parametrize("judges", [True, False])
def test_rows_of_updated_weights_are_neither_recorded_nor_judged(stored: StoredProfile, judges: bool) -> None:
    monitor = _monitor(stored if judges else None)
    commit = _one("q", 0, torch.zeros((1, WIDTH)), weights=1)
    monitor.read(commit, "s")
    assert (commit.monitored, monitor.rows) == ([], 0)
    assert "weights were updated" in str(monitor.off)
    assert monitor.alerts()["events"][0]["event"] == "retrain"


def test_a_request_that_had_a_row_shed_is_not_judged_by_the_others(stored: StoredProfile) -> None:
    monitor = _monitor(stored)
    x = torch.full((1, WIDTH), 9.0)
    shed = _one("r", 1, x, ends=False)
    monitor.read(_one("r", 0, x, ends=False), "s")
    monitor.read(shed, "s", late=True)
    monitor.read(_one("r", 2, x), "s")
    monitor.read(_one("q", 3, x), "s")
    assert shed.monitored == []
    assert (monitor.requests, monitor.rows, monitor.shed, monitor.status()["shed"]) == (1, 3, 1, 1)
    assert monitor.line("s")["shed"] == 1


def test_a_slow_monitor_sheds_rows_and_the_ledger_loses_nothing(
    make_engine: Callable[..., FakeEngine], stored: StoredProfile
) -> None:
    monitor = _monitor(stored)

    def slowly(x_ND: torch.Tensor) -> np.ndarray:
        time.sleep(0.05)
        return _reading().columns(x_ND)

    monitor._reading = type("Slow", (), {"columns": staticmethod(slowly)})()  # type: ignore[assignment]
    engine = make_engine(monitor=monitor, queue=128)
    _plant(engine, shift_from=None)
    for n in range(40):
        _serve(engine, range(n, n + 1))
        time.sleep(0.03)  # each brings 7 commits, and 0.15 s of reading
    run, checks = checked(engine.flush())
    assert not violations(checks)
    assert engine.live.status()["positions"]["dropped"] == 0
    assert len(run.requests()) == 40
    assert monitor.shed > 0
    assert monitor.off is None


def test_what_the_drift_log_did_not_take_is_written_the_next_time(stored: StoredProfile, tmp_path: Path) -> None:
    monitor = _monitor(stored)
    monitor.stop("planted")
    with pytest.raises(OSError, match="missing"):
        monitor.write_log(tmp_path / "missing", monitor.line("s"))
    monitor.write_log(tmp_path)
    monitor.write_log(tmp_path)
    log = [json.loads(x) for x in (tmp_path / DRIFT_LOG).read_text().splitlines()]
    assert [x.get("event", x.get("segment")) for x in log] == ["off", "s"]


def test_a_drift_log_that_cannot_be_written_holds_up_nothing_else(
    make_engine: Callable[..., FakeEngine], stored: StoredProfile, tmp_path: Path
) -> None:
    (tmp_path / "live" / DRIFT_LOG).mkdir(parents=True)
    engine = make_engine(monitor=_monitor(stored))
    _plant(engine, shift_from=None)
    _serve(engine, range(2))
    run, checks = checked(engine.flush())
    assert not violations(checks)
    assert run.manifest["monitor"]["drift_log"]["requests"] == 2
    assert engine.live.write_errors > 0


def test_a_segment_is_closed_also_if_its_monitor_cannot_say_what_it_read(
    make_engine: Callable[..., FakeEngine], stored: StoredProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = _monitor(stored)
    engine = make_engine(monitor=monitor)
    _serve(engine, range(2))
    monkeypatch.setattr(monitor, "line", lambda _segment: {}["planted"])
    run, checks = checked(engine.flush())
    assert not violations(checks)
    assert (run.manifest["status"], len(run.requests())) == ("complete", 2)
    assert engine.live.write_errors > 0


def test_a_monitor_that_can_find_nothing_unusual_says_so(
    stored: StoredProfile, caplog: pytest.LogCaptureFixture
) -> None:
    assert _monitor(stored).alerts()["cannot_alarm"] is None  # 5 statistics, 100 references
    found = _monitor(stored, share=0.01).alerts()["cannot_alarm"]
    assert "100 trajectories of the profile's reference and 5 statistics" in found
    assert found in caplog.text


def test_a_profile_of_what_a_monitor_read_is_sampled_by_its_rule(
    make_engine: Callable[..., FakeEngine], wait: Callable
) -> None:
    watch = _watch().model_copy(update={"sampling": Sampling(entropy=ByEntropy(above=1.0)), "vectors": {}})
    monitor = _monitor(None, watch)
    engine = make_engine(monitor=monitor)
    _plant(engine, shift_from=None)
    _serve(engine, range(30))
    found = from_monitored([load_run(engine.flush())])
    assert found.watch.sampling.entropy == ByEntropy(above=1.0)
    assert len(found.profile.reference) == 15
    assert "mahalanobis" not in found.profile.statistics


def _recorded(weights: str, seed: int, reused: Sequence[tuple[str, str, int]] = (), **told: Any) -> Any:
    """A run with 20 requests of 100 tokens, of which a monitor read 4 rows each.

    Args:
        reused: who reused whose entries, to which position.
    """
    rng = np.random.default_rng(seed)
    rows = [{"rid": f"r{i}", "probability": 0.5, "values": [float(rng.normal())]} for i in range(20) for _ in range(4)]
    monitor = {**_watch(vectors={}, columns=["log norm"]).model_dump(mode="json"), "model_weight_hash": weights, **told}
    spans = pd.DataFrame(reused, columns=["rid", "origin_rid", "end"]).assign(status="reused")
    requests = pd.DataFrame({"rid": [f"r{i}" for i in range(20)], "prompt_len": 100})
    return SimpleNamespace(
        monitored=lambda: pd.DataFrame(rows),
        manifest={"monitor": monitor},
        spans=lambda: spans,
        engine_requests=lambda: requests,
    )


def test_a_profile_has_as_many_rows_of_a_request_as_the_monitor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "_facts", lambda _runs: [])
    runs = [_recorded("a", seed, rows=2) for seed in range(2)]
    found = from_monitored(runs)
    assert found.watch.rows == 2
    assert found.profile.quantiles["rows"].tolist() == [40 * 2]  # which is what a server judges by
    assert from_monitored(runs, rows=3).profile.quantiles["rows"].tolist() == [40 * 3]
    with pytest.raises(ConfigError, match="different rules"):
        from_monitored([runs[0], _recorded("a", 2, rows=3)])


def test_turns_of_a_conversation_are_one_family_and_a_common_system_prompt_is_none() -> None:
    reused = [(f"r{i}", "r0", 40) for i in range(1, 20)]  # of all, the same first tokens
    reused += [("r6", "r5", 105), ("r7", "r6", 120)]  # with what was generated
    reused += [("r9", "r8", 99)]  # the same prompt
    reused += [("r11", "r10", 98), ("r12", "before", 98)]
    families = read_monitored([_recorded("a", 0, reused)]).frame.set_index("rid")["family"]
    assert families["r5"] == families["r6"] == families["r7"]
    assert families["r8"] == families["r9"]
    assert families.nunique() == 20 - 3


def test_a_profile_is_of_one_model() -> None:
    with pytest.raises(ConfigError, match="several models"):
        from_monitored([_recorded("a", 0), _recorded("b", 1)])


def test_weights_of_unequal_sampling_give_the_mean_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    n = 400_000
    entropy, draw = rng.uniform(0, 4, n), rng.random(n)
    rule = Sampling(entropy=ByEntropy(above=3, high=4, low=64))
    candidates = rule.candidates(np.zeros(n), draw)
    read, probability = rule.chosen(draw[candidates], entropy[candidates])
    x, p = entropy[candidates][read], probability[read]
    assert (x / p).sum() / (1 / p).sum() == pytest.approx(2.0, abs=0.05)
    assert abs(x.mean() - 2.0) > 0.5  # which is what the weights are for
    assert read.sum() / n == pytest.approx(0.25 / 4 + 0.75 / 64, rel=0.05)


def test_a_profile_is_read_as_it_was_written_and_refused_when_it_was_changed(
    stored: StoredProfile, tmp_path: Path
) -> None:
    again = profile(_usual(200, seed=1))[0]
    x = _usual(10, seed=9)
    assert np.allclose(stored.profile.scores(x), again.scores(x))
    with pytest.raises(ConfigError, match="a profile already"):
        write_profile(tmp_path / "p", stored)
    with pytest.raises(ConfigError, match="reads none"):
        stored.reading(tmp_path)
    data = bytearray((tmp_path / "p" / "profile.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "p" / "profile.safetensors").write_bytes(bytes(data))
    with pytest.raises(ConfigError, match="was changed"):
        read_profile(tmp_path / "p")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "name a `profile`"),
        ({"profile": "p", "rows": 3}, "`rows` is what the profile says"),
        ({"hook_point": "hook_embed"}, "`hook_point` is"),
        ({"hook_point": POINT, "features": [1]}, "`features` needs `sae`"),
        ({"hook_point": POINT, "vectors": ["a"]}, "belong together"),
        ({"hook_point": POINT, "sampling": {"every": 4, "entropy": {"above": 1}}}, "two rules"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MonitorConfig.model_validate(given)
