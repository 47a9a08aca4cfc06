"""Training on rows that are not kept: the batches of the two-step way where all fits, bounded memory where not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.run.run import Run
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.harvested import Harvested, harvested
from sglang_probe.sae.manifest import of
from sglang_probe.sae.stream import Buffer
from sglang_probe.sae.train import norm_scale
from sglang_probe.studies.sae_train import stream
from sglang_probe.studies.sae_train.config import SaeTrainConfig
from sglang_probe.studies.sae_train.study import SERVED, prepare, read_results
from tests.sae.lens import needs_sae_lens
from tests.sae.made_rows import POINT, Text, make_run_of
from tests.sae.planted import Planted

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

    def record(requests: Sequence[Any], number: int) -> Harvested | None:
        served.append([r.rid for r in requests])
        rows = harvested([run], POINT)
        return rows.only(rows.tokens["rid"].isin(served[-1]).to_numpy())

    return record


def buffer_of(of: SaeTrainConfig, run: Run, served: list[list[str]]) -> tuple[stream.Parts, Buffer]:
    parts = stream.Parts(of, recording(run, served))
    training, _ = stream.split_requests(of, in_order())
    assert of.harvest is not None
    mix = None if of.mix is None else {str(k): v for k, v in of.mix.items()}
    source = lambda: parts.serve(training, train=True)  # noqa: E731
    return parts, Buffer(source, of.harvest.buffer_rows, mix, of.order_seed)


def in_order() -> list[Any]:
    """The order in which a run lists them."""
    return sorted(REQUESTS, key=lambda r: r.rid)


def test_batches_are_those_of_the_two_step_way_and_the_workload_is_served_once(run: Run) -> None:
    two_step = prepare(config(run), "x")
    served: list[list[str]] = []
    parts, buffer = buffer_of(config(), run, served)
    batches = buffer.batches(32)
    for step in range(50):  # nine epochs
        expected = two_step.train.x_ND[torch.from_numpy(two_step.order.batch(step, 32))]
        assert torch.equal(next(batches), expected), step
    assert sum(map(len, served)) == 9
    assert [len(s) for s in served] == [4, 4, 1]
    assert buffer.epoch_rows == two_step.order.epoch_length == parts.rows == parts.served
    assert parts.variance == pytest.approx(float(two_step.train.x_ND.double().var(0, correction=0).sum()))


def test_a_larger_workload_is_served_again_and_every_row_counts_once_a_pass(run: Run) -> None:
    served: list[list[str]] = []
    parts, buffer = buffer_of(config(harvest={"requests": 2, "buffer_rows": 60}), run, served)
    rows = prepare(config(run), "x").train.x_ND
    batches = buffer.batches(19)
    one_pass = torch.cat([next(batches) for _ in range(len(rows) // 19)])
    assert len(one_pass) == len(rows)
    order = [x.numpy()[np.lexsort(x.numpy().T)] for x in (one_pass, rows)]
    assert np.array_equal(*order)
    next(batches)
    assert served[5] == served[0]  # from the beginning, after five parts
    assert buffer.epoch_rows == parts.rows == len(rows) < parts.served
    assert buffer.fills >= 4
    assert parts.variance == pytest.approx(float(rows.double().var(0, correction=0).sum()))


def test_a_remainder_that_cannot_be_mixed_is_passed_over_and_a_source_that_cannot_is_not(run: Run) -> None:
    rows = harvested([run], POINT)
    rows = replace(rows, tokens=rows.tokens.assign(phase=np.where(np.arange(len(rows)) % 2, "decode", "prefill")))
    prefill, decode = np.arange(0, len(rows), 2), np.arange(1, len(rows), 2)
    mix = {"prefill": 0.5, "decode": 0.5}

    def parts() -> Iterator[Harvested]:
        yield rows.only(np.concatenate([prefill[:20], decode[:20]]))
        yield rows.only(prefill[20:30])

    buffer = Buffer(parts, 40, mix, 0)
    batches = buffer.batches(10)
    assert all(len(next(batches)) == 10 for _ in range(12))
    assert buffer.skipped >= 2
    assert buffer.epoch_rows == 40
    with pytest.raises(ConfigError, match=r"no rows of that phase|leave no rows"):
        next(Buffer(lambda: iter([rows.only(prefill[:10])]), 40, mix, 0).batches(10))


def test_the_buffer_holds_no_more_rows_than_it_may_and_a_part(run: Run) -> None:
    rows = harvested([run], POINT)
    given: list[int] = []

    def parts() -> Iterator[Harvested]:
        for i in range(30):
            given.append(i)
            yield rows.only(np.arange(7 * i, 7 * i + 7))

    batches = Buffer(parts, 20, None, 0).batches(7)
    for n in range(1, 10):
        next(batches)
        # Of three parts in the buffer and the next one, which showed that there is more.
        assert len(given) <= 3 * ((n + 2) // 3) + 1


def test_a_source_without_rows_ends_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match="nothing was recorded"):
        next(Buffer(lambda: iter(()), 10, None, 0).batches(4))


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
        ({"most_rows": 5}, "`most_rows` is of recorded"),
    ],
)
def test_what_contradicts_itself_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**keys)
    with pytest.raises(ConfigError, match="give `runs`, or `harvest`"):
        parse_config(GIVEN, SaeTrainConfig, where="test")


def test_an_interrupted_training_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "stream_identity", lambda *_: {})
    (tmp_path / "training.json").write_text("{}")
    prepared: Any = None
    with pytest.raises(RunDirectoryError, match="rows were not kept"):
        stream.train_stream(config(), prepared, tmp_path, overwrite=False, resume=True, tell=lambda _: lambda _: None)


@needs_sae_lens
@pytest.mark.slow
def test_dictionaries_are_those_of_the_two_step_way(run: Run, tmp_path: Path) -> None:
    from sglang_probe.studies.sae_train.study import open_folder, train_all

    two_step = prepare(config(run), "x")
    open_folder(tmp_path / "two", two_step.identity, overwrite=False, resume=False)
    train_all(config(run), two_step, tmp_path / "two", lambda _: lambda _: None)
    _, buffer = buffer_of(config(), run, [])
    scale, made = stream.learn(config(), buffer, two_step.held_out, tmp_path / "one", lambda _: lambda _: None)
    assert scale == two_step.scale == norm_scale([two_step.train.x_ND[torch.from_numpy(two_step.order.batch(0, 171))]])
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
