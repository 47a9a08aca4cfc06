"""The steering instrument without an engine: admission, isolation, the layer hook, and what happens when it fails."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import scheduler
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import steer as module
from sglang_probe.engine.hooks.instruments import steer_graphs
from sglang_probe.engine.hooks.instruments.steer import Steering
from sglang_probe.engine.hooks.instruments.steered import steered_of
from sglang_probe.engine.hooks.requests import made, read_limit
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.sae.folder import write_sae
from sglang_probe.steering.library import write_sae_entry
from tests.end_to_end.steering import MODEL, WIDTH, make_library
from tests.engine.made_session import SCHEDULER, make_session
from tests.sae.small import random_sae

UP = {"vector": "up", "strength": 6.0}
PROMPT = 16


class Req:
    """A `Req`, as far as an instrument sees it."""

    def __init__(self, **probe: Any) -> None:
        self.rid, self.extra_key, self.cache_salt = "r", None, None
        self.sampling_params = SimpleNamespace(custom_params={"probe": probe} if probe else None, max_new_tokens=4)
        self.origin_input_ids = [0] * PROMPT
        self.skip_radix_cache_insert = False
        self.to_finish: Any = None
        self.refused: str | None = None
        self.over = False

    def set_finish_with_abort(self, message: str) -> None:
        self.refused = message

    def finished(self) -> bool:
        return self.over


class Layer(torch.nn.Module):
    """A decoder layer of SGLang: its output, and the residual beside it in the forward batch."""

    def forward(self, x_ND: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        return x_ND


class Release:
    """As far as a residual stream goes."""

    def residual(self, batch: Any, output: torch.Tensor) -> torch.Tensor:
        return output + batch.residual

    def changeable_residual(self, batch: Any, output: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = batch.residual
        return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    make_library(folder)
    return folder


def attached(
    monkeypatch: pytest.MonkeyPatch, library: Path, graphs: bool = False, tp_size: int = 1, **steer: Any
) -> tuple[Steering, list[Layer]]:
    """The instrument on a model of four layers."""
    config = EngineProbeConfig.model_validate(
        {
            "run": "run",
            "asks": ["steer"],
            "simulated_graphs": graphs,
            "steer": {"library": str(library), **steer},
            **({"live": {}} if "clamps" in steer else {}),
        }
    )
    monkeypatch.setattr(steer_graphs, "graph_rows", lambda: 4)
    session = make_session(monkeypatch, config)
    session.tp_size = tp_size
    steering = session.of(Steering)
    assert steering is not None
    layers = [Layer() for _ in range(4)]
    monkeypatch.setattr(module, "check_architecture", lambda _name: None)
    monkeypatch.setattr(module, "release", Release)
    steering.attach(
        SimpleNamespace(
            device="cpu",
            model=SimpleNamespace(model=SimpleNamespace(layers=layers)),
            model_config=SimpleNamespace(hidden_size=WIDTH),
            server_args=SimpleNamespace(model_path=str(MODEL)),
        )
    )
    steering.open(config, None)
    return steering, layers


def admitted(**probe: Any) -> Req:
    req = Req(**probe)
    made(req, SCHEDULER)
    return req


def batch_of(rows: int) -> Any:
    return SimpleNamespace(input_ids=[0] * rows)


def plan(starts: list[int], ends: list[int]) -> Any:
    return SimpleNamespace(starts=starts, ends=ends, under={})


def test_hooks_are_on_the_layers_of_the_library_and_on_no_other(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    _, layers = attached(monkeypatch, library)
    assert [len(layer._forward_hooks) for layer in layers] == [0, 1, 1, 0]


def test_an_unused_library_touches_no_tensor(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    steering, layers = attached(monkeypatch, library)
    req = admitted()
    steering.launch([req], [Ask()], plan([0], [PROMPT]))
    for layer in layers:
        layer(torch.zeros(PROMPT, WIDTH), forward_batch=None)  # has no residual that could be touched
    assert (req.extra_key, req.skip_radix_cache_insert, read_limit(req)) == (None, False, None)


def test_rows_of_others_in_the_same_forward_keep_their_bits(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    steering, layers = attached(monkeypatch, library)
    torch.manual_seed(0)
    reqs = [admitted(), admitted(steer=[UP]), admitted()]
    forward = plan([0, PROMPT + 2, PROMPT], [5, PROMPT + 3, PROMPT + 1])
    steering.launch(reqs, [Ask()] * 3, forward)
    given = torch.randn(7, WIDTH)
    batch = SimpleNamespace(residual=given.clone(), forward_mode=None)
    layers[1](torch.randn(7, WIDTH), forward_batch=batch)
    others = [0, 1, 2, 3, 4, 6]
    assert torch.equal(batch.residual[others], given[others])
    assert torch.allclose((batch.residual[5] - given[5]).norm(), torch.tensor(6.0), rtol=1e-4)
    assert {i: (u.onset, u.prompt_len) for i, u in forward.under.items()} == {1: (0, PROMPT)}
    steering.launched()
    layers[1](torch.randn(7, WIDTH), forward_batch=None)  # whatever runs next is of no request


def test_a_prompt_that_sglang_cut_after_it_was_admitted_is_not_steered_by_the_positions_of_another(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    schedule_batch: Any = ModuleType("schedule_batch")
    schedule_batch.FINISH_ABORT = lambda message: ("abort", message)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", schedule_batch)
    steering, _ = attached(monkeypatch, library)
    windows: list[dict[str, Any]] = [{"prompt_window": [-4, None]}, {}, {}]  # `{}`: all, however many there are
    req, every, other = (admitted(steer=[{**UP, **w}]) for w in windows)
    for cut in (req, every):
        cut.origin_input_ids = cut.origin_input_ids[:10]
    forward = plan([0, 0, 0], [10, 10, PROMPT])
    steering.launch([req, every, other], [Ask()] * 3, forward)
    assert "SGLang cut its prompt of 16 tokens to 10" in req.to_finish[1]
    assert req.skip_radix_cache_insert
    assert {i: u.prompt_len for i, u in forward.under.items()} == {1: 10, 2: PROMPT}
    assert [p.row.min() for p in steering.passes[1]] == [10]
    assert every.to_finish is other.to_finish is None


def test_equal_histories_share_a_namespace_and_others_do_not(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    steering, _ = attached(monkeypatch, library)
    one, same, other = (admitted(steer=[s]) for s in (UP, dict(UP), {**UP, "strength": 7}))
    assert one.extra_key == same.extra_key != other.extra_key
    assert one.extra_key is not None
    assert not one.skip_radix_cache_insert
    late = admitted(steer=[{**UP, "phases": ["decode"], "generation_window": [3, None]}])
    assert (late.extra_key, late.skip_radix_cache_insert, read_limit(late)) == (None, True, PROMPT + 2)
    # A client cannot name it, and after a new start nobody can.
    steering.open(steering.config, None)
    assert admitted(steer=[UP]).extra_key != one.extra_key


def test_interventions_that_change_nothing_leave_a_request_alone(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    attached(monkeypatch, library)
    for steer in ([], [{**UP, "strength": 0}], [{**UP, "phases": ["prefill"], "prompt_window": [99, None]}]):
        req = admitted(steer=steer)
        assert steered_of(req) is None
        assert (req.extra_key, req.skip_radix_cache_insert, req.refused) == (None, False, None)


def test_a_deployment_is_everybodys_and_has_one_namespace(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    steering, _ = attached(monkeypatch, library, deployment=[{**UP, "op": "cap", "exclude": [0]}])
    plain, other, own = admitted(), admitted(), admitted(steer=[{**UP, "phases": ["decode"]}])
    assert plain.extra_key == other.extra_key != own.extra_key
    assert None not in (plain.extra_key, own.extra_key)
    steered = steered_of(own)
    assert steered is not None
    assert [s.op for s in steered.spec.steps] == ["cap", "add"]
    assert not Steering.serves(steering.config, EngineProbeConfig(run=Path("run")))


def test_under_tensor_parallelism_what_each_rank_would_find_for_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    gate = {**UP, "phases": ["decode"], "gate": {"by": "probe", "probe": "fires"}}
    attached(monkeypatch, library, tp_size=2)
    assert "this engine runs under tensor parallelism" in str(admitted(steer=[gate]).refused)
    assert admitted(steer=[UP]).refused is None
    attached(monkeypatch, library, tp_size=2, deployment=[{**UP, "op": "cap"}])
    with pytest.raises(UnsupportedError, match="`budget_ms` under tensor parallelism"):
        attached(monkeypatch, library, tp_size=2, budget_ms=2.0)


def test_a_rank_that_records_nothing_makes_the_same_changes(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    _, layers = attached(monkeypatch, library, tp_size=2)
    monkeypatch.setattr(module.guard.active(), "recorder", None)
    req = admitted(steer=[UP])
    mode = SimpleNamespace(is_decode=lambda: False, is_mixed=lambda: False)
    batch = SimpleNamespace(reqs=[req], forward_mode=mode, prefix_lens=[0], extend_lens=[PROMPT])
    changed = SimpleNamespace(residual=torch.zeros(PROMPT, WIDTH), forward_mode=None)

    def original(*_args: Any) -> Any:
        layers[1](torch.zeros(PROMPT, WIDTH), forward_batch=changed)

    scheduler.run_batch(original, None, batch)
    assert torch.allclose(changed.residual.norm(dim=1), torch.full((PROMPT,), 6.0), rtol=1e-4)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        ([{"vector": "down", "strength": 1}], r"custom_params.probe.steer\[0\].vector: `down` is not in the library"),
        ([{**UP, "op": "ablate_feature", "strength": 1}], "needs a feature"),
        ([{**UP, "strenght": 1}], "unknown key `steer.0.strenght`; did you mean `strength`"),
        ({"vector": "up"}, "steer"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_key(
    steer: Any, message: str, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    attached(monkeypatch, library)
    refused = admitted(steer=steer).refused
    assert re.search(message, str(refused))


def test_vectors_of_the_weights_before_an_update_are_refused(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    steering, _ = attached(monkeypatch, library)
    module.guard.active().weights.append({"number": 1})
    assert "weights were updated" in str(admitted(steer=[UP]).refused)
    assert steering.passes == {}


def test_a_library_of_another_model_or_another_content_does_not_start(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    with pytest.raises(UnsupportedError, match="was changed after the recording was prepared"):
        attached(monkeypatch, library, hash="0" * 64)
    monkeypatch.setattr(module, "weight_hash_of_folder", lambda _path: "0" * 64)
    with pytest.raises(ConfigError, match="was made from weights"):
        attached(monkeypatch, library)


@pytest.mark.parametrize(
    "config",
    [
        {"asks": ["steer"]},
        {"steer": {"library": "x"}},
        {"steer": {"library": "x", "deployment": [{**UP, "phases": ["decode"]}]}},
        {"steer": {"library": "x", "deployment": [{**UP, "prompt_window": [0, 5]}]}},
    ],
)
def test_configurations_that_mean_nothing_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EngineProbeConfig.model_validate({"run": "run", **config})


def test_if_a_change_cannot_be_made_its_requests_end_and_the_recording_stops(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    steering, layers = attached(monkeypatch, library)
    session = module.guard.active()
    monkeypatch.setattr(session, "_tell_fault", lambda _fault: None)
    schedule_batch: Any = ModuleType("schedule_batch")
    schedule_batch.FINISH_ABORT = lambda message: ("abort", message)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", schedule_batch)
    plain, steered = admitted(), admitted(steer=[UP])
    steering.launch([plain, steered], [Ask()] * 2, plan([0, 0], [PROMPT, PROMPT]))
    batch = SimpleNamespace(residual=torch.zeros(PROMPT, WIDTH), forward_mode=None)  # half of the rows
    layers[1](torch.zeros(PROMPT, WIDTH), forward_batch=batch)
    assert "layer 1 has 16 rows, and row 31 is to be changed" in steered.to_finish[1]
    assert steered.skip_radix_cache_insert
    assert plain.to_finish is None
    assert session.fault is not None
    assert session.recorder is None


def test_if_the_recording_stops_requests_go_on_as_they_were_asked(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    steering, layers = attached(monkeypatch, library)
    session = module.guard.active()
    monkeypatch.setattr(session, "_tell_fault", lambda _fault: None)
    req = admitted(steer=[UP])
    session.fail("elsewhere", OSError("disk full"))
    mode = SimpleNamespace(is_decode=lambda: False, is_mixed=lambda: False)
    batch = SimpleNamespace(reqs=[req], forward_mode=mode, prefix_lens=[0], extend_lens=[PROMPT])
    changed = SimpleNamespace(residual=torch.zeros(PROMPT, WIDTH), forward_mode=None)

    def original(*_args: Any) -> Any:
        layers[1](torch.zeros(PROMPT, WIDTH), forward_batch=changed)
        return SimpleNamespace(can_run_cuda_graph=False)

    scheduler.run_batch(original, None, batch)
    assert torch.allclose(changed.residual.norm(dim=1), torch.full((PROMPT,), 6.0), rtol=1e-4)
    assert steering.passes == {}
    assert "the recording has stopped" in str(admitted(steer=[UP]).refused)


def test_if_the_recording_stops_within_a_forward_the_layers_to_come_go_on(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    steering, layers = attached(monkeypatch, library)
    session = module.guard.active()
    monkeypatch.setattr(session, "_tell_fault", lambda _fault: None)
    steering.launch([admitted(steer=[UP])], [Ask()], plan([0], [PROMPT]))
    session.fail("a tap of an earlier layer", OSError("disk full"))
    changed = SimpleNamespace(residual=torch.zeros(PROMPT, WIDTH), forward_mode=None)
    layers[1](torch.zeros(PROMPT, WIDTH), forward_batch=changed)
    assert torch.allclose(changed.residual.norm(dim=1), torch.full((PROMPT,), 6.0), rtol=1e-4)


def test_what_is_recorded_into_graphs_changes_the_same_bits(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    found = []
    for graphs in (False, True):
        steering, layers = attached(monkeypatch, library, graphs=graphs)
        torch.manual_seed(0)
        residual, output = torch.randn(3, WIDTH).bfloat16(), torch.randn(3, WIDTH).bfloat16()
        reqs = [admitted(), admitted(steer=[UP, {"vector": "up", "op": "cap", "strength": 1}]), admitted(steer=[UP])]
        steering.launch(reqs, [Ask()] * 3, plan([PROMPT] * 3, [PROMPT + 1] * 3))
        steering.load(batch_of(3))
        layers[1](output, forward_batch=SimpleNamespace(residual=residual, forward_mode=None))
        found.append(residual)
        steering.launched()
        steering.load(batch_of(3))  # a forward of no request: the same operations, and nothing changes
        before = residual.clone()
        layers[1](output, forward_batch=SimpleNamespace(residual=residual, forward_mode=None))
        assert torch.equal(residual, before)
    assert torch.equal(*found)


@pytest.fixture
def with_sae(library: Path, tmp_path: Path) -> Path:
    """The library, and an SAE after layer 3."""
    folder = tmp_path / "vectors" / "library"
    shutil.copytree(library, folder)
    write_sae(random_sae("jumprelu", width=WIDTH), folder.parent / "sae")
    write_sae_entry(
        folder,
        folder.parent / "sae",
        name="whole",
        hook_point="blocks.3.hook_resid_post",
        model="probe-text",
        model_weight_hash=weight_hash_of_folder(MODEL),
        made_by={"command": "test"},
    )
    return folder


def test_rows_are_spliced_and_others_of_the_forward_keep_their_bits(
    monkeypatch: pytest.MonkeyPatch, with_sae: Path
) -> None:
    steering, layers = attached(monkeypatch, with_sae)
    assert [len(layer._forward_hooks) for layer in layers] == [0, 1, 1, 1]
    req = admitted(steer=[{"vector": "whole", "op": "splice"}])
    assert req.refused is None
    steering.launch([Req(), req], [Ask(), Ask()], plan([0, 0], [2, 2]))
    x = torch.randn(4, WIDTH)
    batch = SimpleNamespace(residual=x.clone())
    layers[3](torch.zeros(4, WIDTH), forward_batch=batch)
    assert torch.equal(batch.residual[:2], x[:2])
    assert torch.allclose(batch.residual[2:], random_sae("jumprelu", width=WIDTH).reconstruct(x[2:]), rtol=1e-4)


def test_graphs_have_no_splice(monkeypatch: pytest.MonkeyPatch, with_sae: Path) -> None:
    """Nor a hook at the layer of an SAE, whose every forward would pay for it."""
    _, layers = attached(monkeypatch, with_sae, graphs=True)
    assert [len(layer._forward_hooks) for layer in layers] == [0, 1, 1, 0]
    req = admitted(steer=[{"vector": "whole", "op": "splice"}])
    assert req.refused is not None
    assert "`splice` by `whole` is not made in graphs" in req.refused
    with pytest.raises(ConfigError, match="`splice` by `whole` is not made in graphs"):
        attached(monkeypatch, with_sae, graphs=True, deployment=[{"vector": "whole", "op": "splice"}])


def test_more_interventions_than_graphs_have_passes_are_refused(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    attached(monkeypatch, library, graphs=True, passes=1)
    assert "2 interventions after layer 1, and the engine's graphs have 1" in str(admitted(steer=[UP, UP]).refused)
    assert admitted(steer=[UP, {"vector": "late", "strength": 1}]).refused is None
