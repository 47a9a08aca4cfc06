"""Training on rows that are not kept: the batches of the two-step way where all fits, bounded memory where not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.harvested import Harvested, harvested
from sglang_probe.sae.manifest import of
from sglang_probe.sae.stream import Buffer
from sglang_probe.sae.train import norm_scale
from sglang_probe.studies.sae_train import checkpoint, parts, stream
from sglang_probe.studies.sae_train.config import SaeTrainConfig
from sglang_probe.studies.sae_train.parts import Parts, parts_of
from sglang_probe.studies.sae_train.study import SERVED, prepare, read_results
from sglang_probe.workload.request import Request, SegmentSpan
from tests.sae.lens import needs_sae_lens
from tests.sae.made_rows import POINT, Text, make_run_of
from tests.sae.planted import Planted

ROOT = Path(__file__).parents[3]
TEXTS, LENGTH = 12, 20
PLANTED = Planted.make(features=12, width=16)
GIVEN = {"hook_point": POINT, "latents": [16], "k": 3, "samples": 1600, "batch_size": 32, "lr_warm_up_steps": 2}
GIVEN |= {"held_out": 0.25, "seeds": [0, 1]}


@dataclass(frozen=True)
class Asked:
    """As much of a request as a stream looks at."""

    rid: str
    family: str | None


REQUESTS: list[Any] = [Asked(f"t{i}", f"f{i}") for i in range(TEXTS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    texts = [Text([*range(LENGTH)], [1], PLANTED.rows(LENGTH, seed=i).numpy()) for i in range(TEXTS)]
    return make_run_of(tmp_path_factory.mktemp("whole") / "run", texts)


def config(run: Run | None = None, **keys: Any) -> SaeTrainConfig:
    harvest = {"workload": {"source": "documents"}, **keys.pop("harvest", {"requests": 4})}
    source = {"harvest": harvest} if run is None else {"runs": [str(run.path)]}
    return parse_config({**GIVEN, **source, **keys}, SaeTrainConfig, where="test")


def recording(run: Run, served: list[list[str]]) -> Callable[[Sequence[Any], int], Harvested | None]:
    """What records: reads the asked requests' rows out of a run that is there, and notes what it was asked."""

    rows = harvested([run], POINT)

    def record(requests: Sequence[Any], number: int) -> Harvested | None:
        served.append([r.rid for r in requests])
        return rows.only(rows.tokens["rid"].isin(served[-1]).to_numpy())

    return record


def stream_of(of: SaeTrainConfig, run: Run, served: list[list[str]], record: Any = None) -> stream.Stream:
    training, _ = stream.split_requests(of, in_order())
    assert of.harvest is not None
    parts = Parts(parts_of(training, of.harvest.requests), record or recording(run, served), lambda _: None)
    parts.counts = True
    mix = None if of.mix is None else {str(k): v for k, v in of.mix.items()}
    number = len(parts_of(training, of.harvest.requests))
    return stream.Stream(Buffer(parts.training, number, of.harvest.buffer_rows, mix, of.order_seed), parts)


def in_order() -> list[Any]:
    """The order in which a run lists them."""
    return sorted(REQUESTS, key=lambda r: r.rid)


def test_batches_are_those_of_the_two_step_way_and_the_workload_is_served_once(run: Run) -> None:
    two_step = prepare(config(run), "x")
    served: list[list[str]] = []
    of = stream_of(config(), run, served)
    parts, buffer = of.parts, of.buffer
    batches = buffer.batches(32)
    for step in range(50):  # nine epochs
        expected = two_step.train.read(two_step.order.batch(step, 32))
        assert torch.equal(next(batches), expected), step
    assert sum(map(len, served)) == 9
    assert [len(s) for s in served] == [4, 4, 1]
    assert buffer.epoch_rows == two_step.order.epoch_length == parts.rows == parts.served
    assert parts.variance == pytest.approx(float(two_step.train.read().double().var(0, correction=0).sum()))


def test_a_larger_workload_is_served_again_and_every_row_counts_once_a_pass(run: Run) -> None:
    served: list[list[str]] = []
    of = stream_of(config(harvest={"requests": 2, "buffer_rows": 60}), run, served)
    parts, buffer = of.parts, of.buffer
    rows = prepare(config(run), "x").train.read()
    batches = buffer.batches(19)
    one_pass = torch.cat([next(batches) for _ in range(len(rows) // 19)])
    assert len(one_pass) == len(rows)
    order = [x.numpy()[np.lexsort(x.numpy().T)] for x in (one_pass, rows)]
    assert np.array_equal(*order)
    next(batches)
    assert served[5] == served[0]  # from the beginning, after five parts
    assert buffer.epoch_rows == parts.rows == len(rows) < parts.served
    assert buffer.at.fills >= 4
    assert parts.variance == pytest.approx(float(rows.double().var(0, correction=0).sum()))


def test_a_remainder_that_cannot_be_mixed_is_passed_over_and_a_source_that_cannot_is_not(run: Run) -> None:
    rows = harvested([run], POINT)
    rows = replace(rows, tokens=rows.tokens.assign(phase=np.where(np.arange(len(rows)) % 2, "decode", "prefill")))
    prefill, decode = np.arange(0, len(rows), 2), np.arange(1, len(rows), 2)
    mix = {"prefill": 0.5, "decode": 0.5}

    parts = [rows.only(np.concatenate([prefill[:20], decode[:20]])), rows.only(prefill[20:30])]
    buffer = Buffer(parts.__getitem__, 2, 40, mix, 0)
    batches = buffer.batches(10)
    assert all(len(next(batches)) == 10 for _ in range(12))
    assert buffer.at.skipped >= 2
    assert buffer.epoch_rows == 40
    with pytest.raises(ConfigError, match=r"no rows of that phase|leave no rows"):
        Buffer(lambda _: rows.only(prefill[:10]), 1, 40, mix, 0).batch(10)


def test_the_buffer_holds_no_more_rows_than_it_may_and_a_part(run: Run) -> None:
    rows = harvested([run], POINT)
    given: list[int] = []

    def part(i: int) -> Harvested:
        given.append(i)
        return rows.only(np.arange(7 * i, 7 * i + 7))

    batches = Buffer(part, 30, 20, None, 0).batches(7)
    for n in range(1, 10):
        next(batches)
        assert len(given) == 3 * ((n + 2) // 3)


def test_other_weights_other_steering_and_other_rows_are_another_training(run: Run) -> None:
    requests = [Request(i, f"r{i}", (1, 2, i), (SegmentSpan("prompt", 0, 3),), f"r{i}", {}) for i in range(4)]

    def identity(weights: str = "a", library: str | None = None, **harvest: Any) -> dict[str, Any]:
        prepared = SimpleNamespace(
            model=SimpleNamespace(name="m", identity={"weights_sha256": {"model.safetensors": weights}}),
            workload=SimpleNamespace(requests=requests),
            library=None if library is None else SimpleNamespace(hash=library),
        )
        return stream.stream_identity(config(harvest=harvest), cast(Any, prepared))

    def steered(strength: float) -> dict[str, Any]:
        return {"steer": {"library": "/tmp", "deployment": [{"vector": "v", "strength": strength}]}}

    assert identity() == identity()
    told = [identity(), identity("b"), identity(rows={"window": 8})]
    told += [identity(library=of, **steered(x)) for of, x in (("1", 5.0), ("2", 5.0), ("1", 6.0))]
    assert all(a != b for i, a in enumerate(told) for b in told[:i])
    assert "/tmp" not in json.dumps(told)


def test_a_part_of_other_weights_ends_the_training(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "job_of", lambda *a, **k: None)
    monkeypatch.setattr(parts, "record_job", lambda *a, **k: run)
    monkeypatch.setattr(parts, "model_of", lambda runs: {"name": "m", "weights_sha256": {"a": "now"}})
    of, prepared = config(), cast(Any, None)
    recorder = parts.Recorder(of, prepared, prepared, tmp_path)
    assert recorder([], 0) is not None
    assert recorder([], 1) is not None
    recorder.resume(recorder.state() | {"model": {"name": "m", "weights_sha256": {"a": "before"}}})
    with pytest.raises(ConfigError, match="weights of `m` are others"):
        recorder([], 2)


def test_a_source_without_rows_ends_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match="nothing was recorded"):
        Buffer(lambda _: None, 3, 10, None, 0).batch(4)


def test_the_same_families_are_held_out_in_either_way(run: Run) -> None:
    two_step = prepare(config(run), "x")
    training, held_out = stream.split_requests(config(), in_order())
    assert {r.family for r in held_out} == set(two_step.held_out.tokens["family"])
    assert {r.family for r in training} == set(two_step.train.tokens["family"])
    assert stream.split_requests(config(evaluate_on=[str(run.path)]), REQUESTS)[1] == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"runs": ["x"]}, "give `runs`, or `harvest`"),
        ({"harvest": {"hook_points": ["hook_embed"]}}, "has no meaning here"),
        ({"harvest": {"name": "x"}}, "has no meaning here"),
        ({"harvest": {"withhold": {"pii": ["email"]}}}, "`harvest: {withhold}` cannot be had here.* under `runs`"),
        ({"most_rows": 5}, "`most_rows` is of recorded"),
    ],
)
def test_what_contradicts_itself_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**keys)
    with pytest.raises(ConfigError, match="give `runs`, or `harvest`"):
        parse_config(GIVEN, SaeTrainConfig, where="test")


SIZES = [{"requests": 2, "buffer_rows": 60}, {"requests": 4}]


@pytest.mark.parametrize("harvest", SIZES)
@pytest.mark.parametrize("weights", [1, 2])
def test_a_buffer_that_goes_on_gives_the_rows_that_were_not_given(run: Run, harvest: dict, weights: int) -> None:
    """Whatever number of batches there were, in whatever order the rows come when they are recorded again."""
    of, plain = config(harvest=harvest), recording(run, [])
    rng = np.random.default_rng(0)

    def several(requests: Sequence[Any], number: int) -> Harvested | None:
        rows = plain(requests, number)
        assert rows is not None
        return rows.only(np.tile(np.arange(len(rows)), weights))  # rows of weight 2 come twice

    def shuffled(requests: Sequence[Any], number: int) -> Harvested | None:
        rows = several(requests, number)
        assert rows is not None
        return rows.only(rng.permutation(len(rows)))

    whole = stream_of(of, run, [], several).buffer
    expected = [whole.batch(19) for _ in range(40)]
    for stop in (0, 1, 5, 12, 26):
        before = stream_of(of, run, [], several).buffer
        for _ in range(stop):
            before.batch(19)
        after = stream_of(of, run, [], shuffled if weights == 1 else several).buffer
        after.resume(*before.state())
        same = stream_of(of, run, [], several).buffer
        same.resume(*before.state())
        for step in range(stop, 40):
            assert torch.equal(same.batch(19), expected[step]), (stop, step)
        # Later fills are of rows in another order; that of the interruption is as it was.
        filled = before.at.fills
        for step in range(stop, 40):
            batch = after.batch(19)
            if after.at.fills > filled:
                break
            assert torch.equal(batch, expected[step]), (stop, step)
        assert after.lost == same.lost == 0


def test_rows_that_are_not_there_any_more_are_told_and_passed_over(run: Run) -> None:
    of = config(harvest={"requests": 12})
    before = stream_of(of, run, []).buffer
    before.batch(19)
    plain = recording(run, [])

    def fewer(requests: Sequence[Any], number: int) -> Harvested | None:
        rows = plain(requests, number)
        assert rows is not None
        return rows.only(rows.tokens["position"].to_numpy() != 5)

    after = stream_of(of, run, [], fewer).buffer
    after.resume(*before.state())
    training = prepare(config(run), "x").train
    there = training.only((training.tokens["position"] != 5).to_numpy()).read()
    found = torch.cat([after.batch(19) for _ in range(30)])
    assert {tuple(x) for x in found.tolist()} == {tuple(x) for x in there.tolist()}
    assert after.lost == 9  # one of each of nine texts to train on


@needs_sae_lens
@pytest.mark.slow
@pytest.mark.parametrize("harvest", SIZES)
def test_a_training_that_ended_before_its_time_goes_on_to_the_same_bits(
    run: Run, tmp_path: Path, harvest: dict[str, Any]
) -> None:
    of = config(harvest=harvest, checkpoint_every=7)
    held_out = prepare(config(run), "x").held_out

    class Ended(Exception):
        pass

    def telling(at_step: int) -> Any:
        def tell(at: dict[str, float]) -> None:
            if at["step"] >= at_step:
                raise Ended

        return lambda _: tell

    whole = stream.learn(of, stream_of(of, run, []), held_out, tmp_path / "whole", None, telling(10**9))
    folder = tmp_path / "parts"
    checkpoint.write_held_out(folder, held_out)
    first = stream_of(of, run, [])
    with pytest.raises(Ended):
        stream.learn(of, first, held_out, folder, None, telling(20))
    saved = checkpoint.read(folder)
    assert saved is not None
    assert torch.equal(saved.held_out.x_ND, held_out.x_ND)
    assert saved.held_out.tokens["family"].tolist() == held_out.tokens["family"].tolist()
    again = stream_of(of, run, [])
    again.parts.resume(saved.told["parts"])
    again.parts.counts = False
    scale, made, resumed = stream.learn(of, again, saved.held_out, folder, saved, telling(10**9))
    assert scale == whole[0]
    assert [r["step"] for r in resumed] == [14]
    assert resumed[0]["rows_recorded_again"] > 0 == resumed[0]["rows_lost"]
    for ours, theirs in zip(made, whole[1], strict=True):
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            assert torch.equal(getattr(ours.sae, name), getattr(theirs.sae, name)), name
        assert ours.curve.equals(theirs.curve)
    counts = stream_of(of, run, [])
    stream.learn(of, counts, held_out, tmp_path / "counts", None, telling(10**9))
    for name in ("rows", "served", "variance"):
        assert getattr(again.parts, name) == pytest.approx(getattr(counts.parts, name), rel=1e-12), name
    assert again.parts.left_out.left_out.equals(counts.parts.left_out.left_out)


KILLED: dict[str, Any] = {"harvest": SIZES[0], "samples": 32 * 400, "checkpoint_every": 2}


def learn_slowly(run: str, folder: str, wait: float = 0.02) -> list[Any]:
    """The training of the next test, from its checkpoint if there is one; in a process that is killed, too."""
    of, path = config(**KILLED), Path(folder)
    saved = checkpoint.read(path)
    source = stream_of(of, load_run(run), [])
    if saved is None:
        held_out = prepare(config(load_run(run)), "x").held_out
        checkpoint.write_held_out(path, held_out)
    else:
        held_out = saved.held_out
        source.parts.resume(saved.told["parts"])
        source.parts.counts = False
    tell = lambda _: lambda _: time.sleep(wait)  # noqa: E731
    _, made, resumed = stream.learn(of, source, held_out, path, saved, tell)
    return [made, resumed]


@needs_sae_lens
@pytest.mark.slow
def test_whenever_it_is_killed_it_goes_on_to_the_same_bits(run: Run, tmp_path: Path) -> None:
    """Checkpoints are written all the time, so that it is killed while one is."""
    whole, _ = learn_slowly(str(run.path), str(tmp_path / "whole"), wait=0)
    folder, here = tmp_path / "parts", "tests.studies.sae_train.test_stream"
    asked = f"from {here} import learn_slowly; learn_slowly({str(run.path)!r}, {str(folder)!r})"
    for _ in range(2):
        before = _step(folder)
        with subprocess.Popen([sys.executable, "-c", asked], cwd=ROOT) as process:
            while _step(folder) < before + 20 and process.poll() is None:
                time.sleep(0.003)
            assert process.poll() is None, "the training ended before it was killed"
            process.kill()
    made, resumed = learn_slowly(str(run.path), str(folder), wait=0)
    assert len(resumed) >= 1  # an interruption is told by the checkpoints after it
    assert all(r["rows_lost"] == 0 < r["rows_recorded_again"] for r in resumed)
    for ours, theirs in zip(made, whole, strict=True):
        assert torch.equal(ours.sae.W_dec, theirs.sae.W_dec)
        assert ours.curve.equals(theirs.curve)


@needs_sae_lens
@pytest.mark.slow
def test_dictionaries_are_those_of_the_two_step_way(run: Run, tmp_path: Path) -> None:
    from sglang_probe.studies.sae_train.study import open_folder, train_all

    two_step = prepare(config(run), "x")
    open_folder(tmp_path / "two", two_step.identity, overwrite=False, resume=False)
    train_all(config(run), two_step, tmp_path / "two", lambda _: lambda _: None)
    of = stream_of(config(), run, [])
    scale, made, _ = stream.learn(config(), of, two_step.held_out, tmp_path / "one", None, lambda _: lambda _: None)
    assert scale == two_step.scale == norm_scale([two_step.train.read(two_step.order.batch(0, 171))])
    for seed, trained in enumerate(made):
        theirs = read_sae(tmp_path / "two" / f"batchtopk-16-seed{seed}")
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(getattr(trained.sae, name), getattr(theirs, name)), name


@needs_sae_lens
@pytest.mark.slow
def test_an_engine_and_a_training_in_one_process_leave_no_rows(cli: Callable, tmp_path: Path) -> None:
    point = "blocks.1.hook_resid_post"
    harvest = {
        "model": "probe-text",
        "dtype": "float32",
        "workload": {"source": "documents", "count": 12, "chars": 400},
    }
    harvest |= {"sampling": {"max_new_tokens": 4, "temperature": 0.0}, "requests": 5}
    path = tmp_path / "stream.yaml"
    path.write_text(json.dumps({**GIVEN, "hook_point": point, "harvest": harvest, "seeds": [0]}))
    done = cli("sae", "train", path, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["of"]["rows"]["kept"] is False
    assert told["of"]["rows"]["requests"] == 9
    assert not list((tmp_path / "out").rglob("shard-*"))
    manifest = of(read_sae(tmp_path / "out" / "batchtopk-16-seed0"))
    assert manifest is not None
    assert (manifest["runs"][0]["rows_kept"], manifest["runs"][0]["parts"]) == (False, 3)
    assert manifest["runs"][0]["positions_by_phase"]["prefill"] > manifest["training"]["rows"]["train"]
    assert json.loads((tmp_path / "out" / SERVED).read_text())["train"] == manifest["training"]["rows"]["train"]
    assert cli("sae", "train", path, "--output", tmp_path / "out", "--resume").returncode == 0
    assert read_results(config(seeds=[0]), tmp_path / "out", "x").dictionaries["rows"].iloc[0] > 0
    assert not (tmp_path / "out" / "held-out").exists()
    assert not (tmp_path / "out" / "checkpoint").exists()


@needs_sae_lens
@pytest.mark.slow
@pytest.mark.engine
def test_a_training_that_was_killed_goes_on_with_the_same_tokens_and_every_row_once(
    cli: Callable, tmp_path: Path
) -> None:
    """Sampled outputs: what is recorded again is forced to the tokens of before, so that it has the same positions."""
    harvest = {"model": "probe-text", "dtype": "float32", "requests": 6, "buffer_rows": 900}
    harvest |= {"workload": {"source": "documents", "count": 30, "chars": 500}}
    harvest |= {"sampling": {"max_new_tokens": 12, "temperature": 1.0}}
    keys = {**GIVEN, "hook_point": "blocks.1.hook_resid_post", "samples": 32 * 400, "checkpoint_every": 10}
    path, out = tmp_path / "stream.yaml", tmp_path / "out"
    path.write_text(json.dumps({**keys, "seeds": [0], "harvest": harvest}))
    command = [sys.executable, "-m", "sglang_probe", "sae", "train", str(path), "--output", str(out)]
    for _ in range(2):  # killed twice, at whatever step it is once a checkpoint was written
        with subprocess.Popen([*command, "--resume"], start_new_session=True, stdout=subprocess.DEVNULL) as process:
            before = _step(out)
            while _step(out) < before + 10 and process.poll() is None:
                time.sleep(0.05)
            assert process.poll() is None, "the training ended before it was killed"
            os.killpg(process.pid, signal.SIGKILL)
    outputs = pd.read_parquet(out / "checkpoint" / "outputs.parquet")
    assert outputs["output_ids"].map(len).max() > 1
    done = cli("sae", "train", path, "--output", out, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["of"]["rows"]
    assert [r["rows_lost"] for r in rows["resumed"]] == [0, 0]
    assert rows["resumed"][0]["rows_recorded_again"] > 0
    assert rows["train"] == rows["epoch"]
    manifest = of(read_sae(out / "batchtopk-16-seed0"))
    assert manifest is not None
    assert not (out / "checkpoint").exists()
    assert manifest["runs"][0]["parts"] < rows["parts"]  # what was recorded again is no part of what is told


def _step(out: Path) -> int:
    """Of the last checkpoint."""
    try:
        curve = json.loads((out / "checkpoint" / "stream.json").read_text())
        return int(curve["step"])
    except (OSError, ValueError):
        return -1
