"""Real eviction in a live engine: each kv head attends to its kept positions alone, and nobody else notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.evicted import EvictedRequest, run_evicted
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.hooks.config import EngineProbeConfig
from sglang_probe.ledger.run import Run, load_run
from sglang_probe.ledger.verify import verify
from sglang_probe.paths import shipped
from sglang_probe.policy.arm import Arm
from sglang_probe.study.drift import row_distance
from sglang_probe.study.eviction import Layer, parse_method
from sglang_probe.study.eviction.from_run import layer_from_run, lookahead_from_run
from sglang_probe.study.eviction.kept import Kept, kept_of, write_kept
from sglang_probe.study.eviction.likelihood import divergence_from, load_unembedding, output_logits, token_nll
from tests.engine import masked_model

pytestmark = pytest.mark.engine
MODEL = shipped("models/probe-text/checkpoint")
LAYERS, KV_HEADS = 4, 4
LAST = "blocks.3.hook_resid_post"
QUERIES = [f"blocks.{i}.attn.{site}" for i in range(4) for site in ("hook_rot_q", "hook_rot_k", "hook_v")]
NEW = 14


def _prepared(concurrency: int) -> Prepared:
    config = {
        "workload": {"source": "shared_prefix", "families": 3, "requests_per_family": 2, "exemplars": 2},
        "dtype": "float32",
        "sampling": {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True},
        "hook_points": ["hook_embed", "blocks.1.hook_resid_post", LAST, *QUERIES],
        "server": {"chunked_prefill_size": 128, "enable_mixed_chunk": True},
        "concurrency": concurrency,
    }
    return Prepared(HarvestConfig.model_validate(config), {"only": Arm()})


def _random(length: int, share: float, *, steps: int = 1, seed: int = 0) -> Kept:
    """Every layer and head keeps its own positions, and its own number of them."""
    g = torch.Generator().manual_seed(seed)
    shares = share * (0.5 + torch.rand(1, LAYERS, KV_HEADS, 1, generator=g))
    keep = torch.rand(steps, LAYERS, KV_HEADS, length, generator=g) < shares
    keep[..., -1] = True
    return Kept(keep)


class Recorded:
    """All recordings of one engine, and what was asked."""

    def __init__(self, folder: Path) -> None:
        self._model = masked_model.load(str(MODEL))
        self._masked: dict[Any, torch.Tensor] = {}
        several, alone = _prepared(6), _prepared(1)
        prompts = [list(r.prompt_ids) for r in several.workload.requests]
        self.prompts = [prompts[0], prompts[1][:40], prompts[2][:150], prompts[3], prompts[4][:129], prompts[5][:333]]
        n = [len(p) for p in self.prompts]
        self.kept = {
            **{f"all {i}": Kept(torch.ones(1, LAYERS, KV_HEADS, n[i], dtype=torch.bool)) for i in range(6)},
            "visible 1": _random(n[1], 0.3, seed=1),
            "visible 2": _random(n[2], 0.1, seed=2),
            "hidden 3": _random(n[3] - 37, 0.2, seed=3),
            "hidden 5": _random(n[5] - 150, 0.5, seed=5),
            "steps 4": _random(n[4], 0.2, steps=6, seed=4),
            "hidden steps 0": _random(n[0] - 5, 0.2, steps=40, seed=6),
        }
        self.keys = {0: "hidden steps 0", 1: "visible 1", 2: "visible 2", 3: "hidden 3", 4: "steps 4", 5: "hidden 5"}
        self.shifted = {k: Kept(v.keep_SYGN.roll(1, -1)) for k, v in self.kept.items()}
        write_kept(folder / "kept", self.kept)
        write_kept(folder / "shifted", self.shifted)
        with EngineHost() as host:

            def record(name: str, requests: Sequence[EvictedRequest], file: str | None, by: Prepared = several) -> Run:
                return run_evicted(by, folder / name, requests, kept=None if file is None else folder / file, host=host)

            full = [EvictedRequest(f"full-{i}", p) for i, p in enumerate(self.prompts)]
            self.full = record("full", full, None)
            self.outputs = [list(r.output_ids) for r in self.full.requests().itertuples()]
            every = [EvictedRequest(f"all-{i}", p, key=f"all {i}") for i, p in enumerate(self.prompts)]
            self.all = record("all", every, "kept")
            forced = [
                EvictedRequest(f"kept-{i}", p, key=self.keys[i], force=self.outputs[i])
                for i, p in enumerate(self.prompts)
            ]
            # Cold, beside full requests of the same prompts, and behind them, with the context from the cache.
            mixed = [*forced[:3], *full, *forced[3:], *[_again(r) for r in forced]]
            self.mixed = record("mixed", mixed, "kept")
            self.wrong = record("wrong", [*full, *forced], "shifted")
            one = EvictedRequest("one", self.prompts[3])
            orders = [one, _named(one, "two"), _named(forced[3], "evicted"), _named(one, "three")]
            self.orders = record("orders", orders, "kept", alone)
            self.free = record("free", [_named(r, r.rid, force=None) for r in forced], "kept")
            self.laq, self.laq_layers = self._laq(folder, record)
            record("pseudo", [EvictedRequest("p", self.prompts[2]), *_pseudo(self.prompts[2])], None)
            self.pseudo = load_run(folder / "pseudo")
            self.refusals = _ask(host, self.full, folder, self.prompts[1])
            self.starts = host.starts

    def masked(self, ids: list[int], kept: Kept | None) -> torch.Tensor:
        """Rows of the last layer by the masked model."""
        key = (tuple(ids), id(kept))
        if key not in self._masked:
            self._masked[key] = masked_model.hidden_states(self._model, ids, kept)[3]
        return self._masked[key]

    def _laq(self, folder: Path, record: Any) -> tuple[Run, list[Layer]]:
        """LAQ in two stages: tokens generated from SnapKV's cache score the prompt for the cache that answers."""
        layers = [layer_from_run(self.full, "full-2", i) for i in range(LAYERS)]
        draft = parse_method({"method": "snapkv", "window": 8})
        self.kept["draft"] = kept_of([draft.select(layer, 24) for layer in layers])
        write_kept(folder / "draft", {"draft": self.kept["draft"]})
        request = EvictedRequest("draft", self.prompts[2], key="draft", sampling={"max_new_tokens": 9})
        first = record("stage 1", [request], "draft")
        self.draft = first
        seen = [
            replace(layer, lookahead={"laq": lookahead_from_run(first, "draft", i, 8)})
            for i, layer in enumerate(layers)
        ]
        laq = parse_method({"method": "laq", "steps": 8, "recent": 8})
        self.kept["laq"] = kept_of([laq.select(layer, 24) for layer in seen])
        write_kept(folder / "laq", {"laq": self.kept["laq"]})
        return record("stage 2", [_named(request, "laq", key="laq")], "laq"), seen


def _pseudo(prompt: list[int]) -> list[EvictedRequest]:
    """DapQ: the first two and the last six prompt tokens stand for the answer."""
    ids = [*prompt, *prompt[:2], *prompt[-6:]]
    return [EvictedRequest("pseudo", ids, publishes=False, sampling={"max_new_tokens": 1})]


def _ask(host: EngineHost, like: Run, folder: Path, prompt: list[int]) -> dict[str, str]:
    """What the engine itself answers to requests that nobody checked before."""
    said = {}
    for name, kept in (("with", folder / "kept"), ("without", None)):
        run = folder / f"direct {name}"
        run.mkdir()
        probe = EngineProbeConfig(
            run=run.resolve(),
            hook_points=like.hook_points,
            forced_outputs=True,
            bypass=True,
            evictions=True,
            kept=kept,
            ignore_interrupt=True,
        )
        engine = host.open(like.manifest["model_path"], like.manifest["server_given"], probe)
        for key in ("visible 2", "nobody", "visible 1"):
            params = {"max_new_tokens": 2, "custom_params": {"probe": {"evict": key}}}
            try:
                said[f"{name} {key}"] = str(len(engine.run(engine.generate(key, prompt, params)).output_ids))
            except ProbeError as e:
                said[f"{name} {key}"] = str(e)
        engine.close_recording()
    return said


def _named(r: EvictedRequest, rid: str, **changes: object) -> EvictedRequest:
    return replace(r, rid=rid, **changes)


def _again(r: EvictedRequest) -> EvictedRequest:
    return _named(r, r.rid + "-again")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("evicted"))


def _expected(recorded: Recorded, run: Run, sets: dict[str, Kept]) -> pd.DataFrame:
    """Largest relative error of rows of the last layer that each request computed, against the masked model."""
    found = []
    for r in run.requests().itertuples():
        kept = sets.get(r.evict)
        ids = [*r.prompt_ids, *r.output_ids][: len(run.activations(r.rid, LAST))]
        rows = recorded.masked(ids, kept)
        error = row_distance(run.activations(r.rid, LAST), rows)[0]
        behind = r.prompt_len if kept is None else kept.length
        found.append((r.rid, error[:behind].max(), error[behind:].max()))
    return pd.DataFrame(found, columns=["rid", "inside", "behind"]).set_index("rid")


def test_every_invariant_holds_and_one_engine_made_all(recorded: Recorded) -> None:
    assert recorded.starts == 1
    for run in (recorded.full, recorded.all, recorded.mixed, recorded.wrong, recorded.orders, recorded.free):
        assert [str(c) for c in verify(run) if not c.holds] == []
    assert (recorded.mixed.forwards()["mode"] == "mixed").any()
    assert recorded.mixed.spans()["chunk"].max() >= 2


def test_a_budget_of_everything_gives_the_tokens_of_the_full_cache(recorded: Recorded) -> None:
    full, everything = recorded.full.requests(), recorded.all.requests()
    assert everything["output_ids"].map(list).tolist() == full["output_ids"].map(list).tolist()
    assert everything["evict"].tolist() == [f"all {i}" for i in range(6)]
    for a, b in zip(full["rid"], everything["rid"], strict=True):
        error = row_distance(recorded.all.activations(b, LAST), recorded.full.activations(a, LAST))[0]
        assert error.max() < 1e-5


def test_rows_are_those_of_the_masked_model(recorded: Recorded) -> None:
    errors = _expected(recorded, recorded.mixed, recorded.kept)
    assert len(errors) == 18
    assert errors.max(axis=None) < 1e-4, errors
    cached = recorded.mixed.requests().set_index("rid")["cached_tokens"]
    for i in range(6):
        # Never beyond its cache, although a full request published the whole prompt.
        assert cached[f"kept-{i}-again"] == min(recorded.kept[recorded.keys[i]].length, len(recorded.prompts[i]) - 1)


def test_a_kept_set_shifted_by_one_position_is_noticed(recorded: Recorded) -> None:
    errors = _expected(recorded, recorded.wrong, recorded.kept)
    evicted = errors[errors.index.str.startswith("kept-")]
    assert (evicted["behind"] > 1e-2).all(), errors
    assert errors["inside"].max() < 1e-4
    right = _expected(recorded, recorded.wrong, recorded.shifted)
    assert right.max(axis=None) < 1e-4


def test_the_run_says_who_was_evicted_and_how_much_was_kept(recorded: Recorded) -> None:
    requests = recorded.mixed.requests().set_index("rid")
    assert requests.loc["full-0", ["evict", "cache_len", "kept"]].isna().all()
    kept = recorded.kept["hidden 3"]
    row = requests.loc["kept-3"]
    assert (row["evict"], row["cache_len"]) == ("hidden 3", kept.length)
    assert list(row["kept"]) == kept.counts_SYG[0].flatten().tolist()
    assert recorded.mixed.manifest["kept"]["frees_memory"] is False
    assert "kept" not in recorded.full.manifest


def test_an_evicted_request_leaves_nothing_in_the_cache(recorded: Recorded) -> None:
    """The same request before and behind an evicted one on its prompt: the same bits, and no entry of the evicted."""
    run = recorded.orders
    assert torch.equal(run.activations("two", LAST), run.activations("three", LAST))
    for r in (recorded.mixed, recorded.wrong, recorded.orders):
        origins = set(r.spans()["origin_rid"].dropna()) | set(r.rebinds()["origin_rid"].dropna())
        assert not any(o.startswith(("kept", "evicted")) for o in origins)


def test_free_running_parts_from_the_full_cache(recorded: Recorded) -> None:
    free, full = recorded.free.requests(), recorded.full.requests()
    differ = [list(a) != list(b) for a, b in zip(free["output_ids"], full["output_ids"], strict=True)]
    assert any(differ)
    visible = [1, 2, 4]
    assert all(free["output_ids"][i][0] == full["output_ids"][i][0] for i in visible)


def test_laq_runs_in_two_stages(recorded: Recorded) -> None:
    assert _expected(recorded, recorded.draft, recorded.kept).max(axis=None) < 1e-4
    assert _expected(recorded, recorded.laq, recorded.kept).max(axis=None) < 1e-4
    full = recorded.full.requests()["output_ids"][2][:9]
    same_text = list(recorded.draft.requests()["output_ids"][0]) == list(full)
    for i, layer in enumerate(recorded.laq_layers):
        ahead = layer.lookahead["laq"]
        assert ahead.q_THD.shape == (8, 8, 32)
        assert layer.future is not None
        if i == 0 and same_text:  # the first layer's queries depend on the token and its position alone
            assert torch.allclose(ahead.q_THD, layer.future.q_THD[:8], atol=1e-5)
        if i:
            assert not torch.allclose(ahead.q_THD, layer.future.q_THD[:8], atol=1e-3)
    assert not torch.equal(recorded.kept["laq"].keep_SYGN, recorded.kept["draft"].keep_SYGN)


def test_pseudo_tokens_are_run_behind_a_cached_prompt(recorded: Recorded) -> None:
    run, n = recorded.pseudo, len(recorded.prompts[2])
    assert run.requests().set_index("rid")["cached_tokens"]["pseudo"] == n
    ahead = lookahead_from_run(run, "pseudo", 3, 32, start=n)
    assert ahead.q_THD.shape[0] == ahead.k_TGD.shape[0] == 8  # type: ignore[union-attr]
    own = layer_from_run(run, "pseudo", 3).q_NHD
    assert torch.equal(ahead.q_THD, own[n:])


def test_predictions_from_captured_rows_are_the_models(recorded: Recorded) -> None:
    unembedding = load_unembedding(MODEL)
    model = masked_model.load(str(MODEL))
    for rid, kept in (("full-1", None), ("kept-2", recorded.kept["visible 2"]), ("kept-3", recorded.kept["hidden 3"])):
        run = recorded.full if kept is None else recorded.mixed
        r = run.requests().set_index("rid").loc[rid]
        ids = [*r["prompt_ids"], *r["output_ids"]]
        with torch.no_grad():
            expected = model.lm_head(model.model.norm(masked_model.hidden_states(model, ids, kept)[3]))
        expected = expected[r["prompt_len"] - 1 : -1]
        ours = output_logits(run, rid, unembedding)
        assert torch.allclose(ours, expected, atol=2e-3)
        nll = token_nll(ours, r["output_ids"])
        chosen = torch.log_softmax(expected, -1)[torch.arange(NEW), torch.tensor(list(r["output_ids"]))]
        assert torch.allclose(nll, -chosen, atol=2e-3)
    full = output_logits(recorded.full, "full-2", unembedding)
    evicted = output_logits(recorded.mixed, "kept-2", unembedding)
    assert divergence_from(full, full).abs().max() < 1e-5
    assert divergence_from(full, evicted)[0] < 1e-4 < divergence_from(full, evicted)[1:].min()
    assert full.argmax(-1).tolist() == list(recorded.outputs[2])


def test_the_engine_itself_refuses_what_cannot_be_had(recorded: Recorded) -> None:
    said = recorded.refusals
    assert "is for 150 positions and the prompt has 40" in said["with visible 2"]
    assert "`evict: nobody` is no kept set of this recording" in said["with nobody"]
    assert said["with visible 1"] == "2"
    assert all("which has none" in said[f"without {key}"] for key in ("visible 2", "nobody", "visible 1"))


def test_what_cannot_be_had_is_refused_in_words(recorded: Recorded, tmp_path: Path) -> None:
    ours = _prepared(1)
    kept = tmp_path / "kept"
    write_kept(kept, {"long": _random(400, 0.5), "narrow": Kept(torch.ones(1, LAYERS, 2, 9, dtype=torch.bool))})
    prompt = recorded.prompts[1]
    for key, file, words in [
        ("long", kept, "is for 400 positions and the prompt has 40"),
        ("other", kept, "is not in"),
        ("narrow", kept, "2 kv heads; the model has 4 of 4"),
        ("long", None, "the recording has no kept sets"),
    ]:
        with pytest.raises(ConfigError, match=words):
            run_evicted(ours, tmp_path / "run", [EvictedRequest("r", prompt, key=key)], kept=file)
    assert not (tmp_path / "run").exists()
