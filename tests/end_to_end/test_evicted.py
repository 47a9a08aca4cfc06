"""Real eviction in a live engine: each kv head attends to its kept positions alone, and nobody else notices."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.eviction import Queries, parse_method
from sglang_probe.eviction.from_run import layer_from_run, lookahead_from_run
from sglang_probe.eviction.keep import kept_of
from sglang_probe.eviction.likelihood import divergence_from, load_unembedding, output_logits, token_nll
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept import KEPT_FILE
from sglang_probe.harvest.kept_requests import KeptRequest, record_kept
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from sglang_probe.paths import shipped
from sglang_probe.policy.arm import Arm
from sglang_probe.run.run import Run, load_run
from sglang_probe.stats.distance import row_distance
from sglang_probe.verify import masked_model
from sglang_probe.verify.verify import verify
from tests.amended import amend

pytestmark = [pytest.mark.engine, pytest.mark.reviewed("eviction")]
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
        "server": {"chunked_prefill_size": 128, "enable_mixed_chunk": True, "max_total_tokens": 65536},
        "concurrency": concurrency,
    }
    return prepare(HarvestConfig.model_validate(config), {"only": Arm()})


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
        lengths = (300, 40, 150, 280, 129, 230)
        prompts = zip(several.workload.requests, lengths, strict=True)
        self.prompts = [list(r.prompt_ids[:n]) for r, n in prompts]
        keys = ("hidden steps 0", "visible 1", "visible 2", "hidden 3", "steps 4", "hidden 5")
        right = {
            "hidden steps 0": _random(295, 0.2, steps=40, seed=6),
            "visible 1": _random(40, 0.3, seed=1),
            "visible 2": _random(150, 0.1, seed=2),
            "hidden 3": _random(243, 0.2, seed=3),
            "steps 4": _random(129, 0.2, steps=6, seed=4),
            "hidden 5": _random(150, 0.5, seed=5),
        }
        self.kept = right | {f"{k} shifted": Kept(v.keep_SYGN.roll(1, -1)) for k, v in right.items()}
        self.kept |= {
            f"all {i}": Kept(torch.ones(1, LAYERS, KV_HEADS, n, dtype=torch.bool)) for i, n in enumerate(lengths)
        }
        with EngineHost() as host:

            def record(name: str, requests: Sequence[KeptRequest], by: Prepared = several) -> Run:
                write_kept(folder / f"{name} kept", self.kept)
                return record_kept(by, folder / name, requests, kept=folder / f"{name} kept", host=host)

            full = [KeptRequest(f"full-{i}", p) for i, p in enumerate(self.prompts)]
            self.full = record_kept(several, folder / "full", full, host=host)
            outputs = [list(r.output_ids) for r in self.full.requests().itertuples()]
            forced = [KeptRequest(f"kept-{i}", p, keys[i], outputs[i]) for i, p in enumerate(self.prompts)]
            self.kept["draft"] = self._selected("snapkv", {})
            draft = KeptRequest("draft", self.prompts[2], "draft", sampling={"max_new_tokens": 9})
            # Cold, beside full requests of the same prompts, and behind them, with the context from the cache.
            requests = [*forced[:3], *full, *forced[3:], *[replace(r, rid=f"{r.rid}-again") for r in forced]]
            requests += [replace(r, rid=f"shifted-{i}", key=f"{r.key} shifted") for i, r in enumerate(forced)]
            requests += [replace(r, rid=f"all-{i}", key=f"all {i}", force=None) for i, r in enumerate(forced)]
            requests += [replace(r, rid=f"free-{i}", force=None) for i, r in enumerate(forced)]
            self.run = record("run", [*requests, draft])
            ahead = {i: lookahead_from_run(self.run, "draft", i, 8) for i in range(LAYERS)}
            self.kept["laq"] = self._selected("laq", ahead)
            one = KeptRequest("one", self.prompts[3])
            evicted = replace(forced[3], rid="evicted")
            in_turn = [one, replace(one, rid="two"), evicted, replace(one, rid="three"), replace(draft, key="laq")]
            self.orders = record("orders", [*in_turn, *_pseudo(self.prompts[4])], alone)
            self.refusals = _ask(host, self.full, folder, self.prompts[1])
            self.starts = host.starts

    def _selected(self, name: str, ahead: dict[int, Queries]) -> Kept:
        """What a method keeps of the third prompt."""
        parameters = {"snapkv": {"window": 8}, "laq": {"steps": 8, "recent": 8}}[name]
        method = parse_method({"method": name, **parameters})
        layers = [layer_from_run(self.full, "full-2", i) for i in range(LAYERS)]
        if ahead:
            layers = [replace(layer, lookahead={"laq": ahead[i]}) for i, layer in enumerate(layers)]
        return kept_of([method.select(layer, 24) for layer in layers])

    def masked(self, ids: list[int], kept: Kept | None) -> torch.Tensor:
        """Rows of the last layer by the masked model."""
        key = (tuple(ids), id(kept))
        if key not in self._masked:
            self._masked[key] = masked_model.hidden_states(self._model, ids, kept)[3]
        return self._masked[key]


def _pseudo(prompt: list[int]) -> list[KeptRequest]:
    """DapQ: the first two and the last six prompt tokens stand for the answer."""
    ids = [*prompt, *prompt[:2], *prompt[-6:]]
    return [KeptRequest("p", prompt), KeptRequest("pseudo", ids, publishes=False, sampling={"max_new_tokens": 1})]


def _ask(host: EngineHost, like: Run, folder: Path, prompt: list[int]) -> dict[str, str]:
    """What the engine itself answers to requests that nobody checked before."""
    said = {}
    for name, kept in (("with", folder / "run kept"), ("without", None)):
        run = folder / f"direct {name}"
        run.mkdir()
        probe = EngineProbeConfig(
            run=run.resolve(),
            hook_points=like.hook_points,
            asks=["force", "cache", "evict"],
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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("evicted"))


def _errors(recorded: Recorded, run: Run, *rids: str, sets: dict[str, Kept] | None = None) -> pd.DataFrame:
    """Largest relative error of the rows of the last layer, inside the cache and behind it, against the masked model.

    Args:
        rids: how the ids of the requests begin.
        sets: in place of those that the requests name.
    """
    found = []
    for r in run.requests().itertuples():
        if r.rid.startswith(rids):
            kept = (sets or recorded.kept).get(r.evict)
            rows = run.activations(r.rid, LAST)
            expected = recorded.masked([*r.prompt_ids, *r.output_ids][: len(rows)], kept)
            error = row_distance(rows, expected)[0]
            behind = r.prompt_len if kept is None else kept.length
            found.append((r.rid, error[:behind].max(), error[behind:].max()))
    return pd.DataFrame(found, columns=["rid", "inside", "behind"]).set_index("rid")


def test_every_invariant_holds_and_one_engine_made_all(recorded: Recorded) -> None:
    assert recorded.starts == 1
    for run in (recorded.full, recorded.run, recorded.orders):
        assert [str(c) for c in verify(run) if not c.holds] == []
    assert (recorded.run.forwards()["mode"] == "mixed").any()
    assert recorded.run.spans()["chunk"].max() >= 2


def test_a_budget_of_everything_gives_the_tokens_of_the_full_cache(recorded: Recorded) -> None:
    everything = recorded.run.requests().set_index("rid")["output_ids"].map(list)
    for rid, expected in recorded.full.requests().set_index("rid")["output_ids"].items():
        same = str(rid).replace("full", "all")
        assert everything[same] == list(expected)
        error = row_distance(recorded.run.activations(same, LAST), recorded.full.activations(str(rid), LAST))[0]
        assert error.max() < 1e-5


def test_rows_are_those_of_the_masked_model(recorded: Recorded) -> None:
    errors = _errors(recorded, recorded.run, "kept", "full")
    assert len(errors) == 18
    assert errors.max(axis=None) < 1e-4, errors
    cached = recorded.run.requests().set_index("rid")
    for i in range(6):
        # Never beyond its cache, although a full request published the whole prompt.
        r = cached.loc[f"kept-{i}-again"]
        assert r["cached_tokens"] == min(r["cache_len"], r["prompt_len"] - 1)


def test_a_kept_set_shifted_by_one_position_is_noticed(recorded: Recorded) -> None:
    unshifted = {f"{k} shifted": v for k, v in recorded.kept.items()}
    errors = _errors(recorded, recorded.run, "shifted", sets=unshifted)
    assert (errors["behind"] > 1e-2).all(), errors
    assert errors["inside"].max() < 1e-4
    assert _errors(recorded, recorded.run, "shifted").max(axis=None) < 1e-4


def test_the_kept_set_of_another_request_is_noticed(recorded: Recorded) -> None:
    """Two sets of 150 positions."""
    exchanged = {"visible 2": recorded.kept["hidden 5"], "hidden 5": recorded.kept["visible 2"]}
    errors = _errors(recorded, recorded.run, "kept-2", "kept-5", sets=exchanged)
    assert (errors["behind"] > 1e-2).all(), errors


def test_the_run_says_who_was_evicted_and_how_much_was_kept(recorded: Recorded) -> None:
    requests = recorded.run.requests().set_index("rid")
    assert requests.loc["full-0", ["evict", "cache_len", "kept"]].isna().all()
    kept = recorded.kept["hidden 3"]
    row = requests.loc["kept-3"]
    assert (row["evict"], row["cache_len"]) == ("hidden 3", kept.length)
    assert list(row["kept"]) == kept.counts_SYG[0].flatten().tolist()
    assert recorded.run.manifest["kept"]["frees_memory"] is False
    assert "kept" not in recorded.full.manifest
    assert torch.equal(KeptFile(recorded.run.path / KEPT_FILE)["hidden 3"].keep_SYGN, kept.keep_SYGN)


def test_an_evicted_request_leaves_nothing_in_the_cache(recorded: Recorded) -> None:
    """The same request before and behind an evicted one on its prompt has the same bits."""
    run = recorded.orders
    assert torch.equal(run.activations("two", LAST), run.activations("three", LAST))
    assert not torch.equal(run.activations("two", LAST)[260:280], run.activations("evicted", LAST)[260:280])
    for r in (recorded.run, recorded.orders):
        (check,) = [c for c in verify(r) if c.name == "kept sets"]
        assert check.covered


def test_entries_that_pass_between_full_and_compressed_are_noticed(recorded: Recorded, tmp_path: Path) -> None:
    """A safeguard taken away on paper: the run then says that entries were shared which must not be."""
    changes = {"full-0": (300.0, "which has a kept set"), "kept-3-again": (10.0, "past its cache")}
    for rid, (cache_len, words) in changes.items():
        copy = tmp_path / rid
        shutil.copytree(recorded.run.path, copy)
        requests = pd.read_parquet(copy / "requests.parquet")
        requests.loc[requests["rid"] == rid, ["evict", "cache_len"]] = ["hidden 3", cache_len]
        requests.to_parquet(copy / "requests.parquet")
        amend(copy)
        (check,) = [c for c in verify(load_run(copy)) if c.name == "kept sets"]
        assert words in str(check.violation)


def test_free_running_parts_from_the_full_cache(recorded: Recorded) -> None:
    outputs = recorded.run.requests().set_index("rid")["output_ids"].map(list)
    pairs = [(outputs[f"free-{i}"], outputs[f"full-{i}"]) for i in range(6)]
    assert any(a != b for a, b in pairs)
    assert all(pairs[i][0][0] == pairs[i][1][0] for i in (1, 2, 4))  # the question was visible
    assert _errors(recorded, recorded.run, "free").max(axis=None) < 1e-4


def test_laq_runs_in_two_stages(recorded: Recorded) -> None:
    """Tokens generated from SnapKV's cache score the prompt for the cache that answers."""
    assert _errors(recorded, recorded.run, "draft").max(axis=None) < 1e-4
    assert _errors(recorded, recorded.orders, "draft").max(axis=None) < 1e-4
    assert recorded.orders.requests().set_index("rid")["evict"]["draft"] == "laq"
    for i in range(LAYERS):
        ahead = lookahead_from_run(recorded.run, "draft", i, 8)
        assert ahead.q_THD.shape == (8, 8, 32)
        future = layer_from_run(recorded.full, "full-2", i).future
        assert future is not None
        same = torch.isclose(ahead.q_THD, future.q_THD[:8], atol=1e-4).flatten(1).all(-1)
        # The first lookahead token is the full cache's; from the second layer on its queries have read the other one.
        assert same[0] == (i == 0)
    assert not torch.equal(recorded.kept["laq"].keep_SYGN, recorded.kept["draft"].keep_SYGN)


def test_pseudo_tokens_are_run_behind_a_cached_prompt(recorded: Recorded) -> None:
    run, n = recorded.orders, len(recorded.prompts[4])
    assert run.requests().set_index("rid")["cached_tokens"]["pseudo"] == n
    ahead = lookahead_from_run(run, "pseudo", 3, 32, start=n)
    assert ahead.q_THD.shape[0] == ahead.k_TGD.shape[0] == 8  # type: ignore[union-attr]
    own = layer_from_run(run, "pseudo", 3).q_NHD
    assert torch.equal(ahead.q_THD, own[n:])


def test_predictions_from_captured_rows_are_the_models(recorded: Recorded) -> None:
    unembedding = load_unembedding(MODEL)
    model = masked_model.load(str(MODEL))
    run = recorded.run
    for rid, kept in (("full-1", None), ("kept-2", recorded.kept["visible 2"]), ("kept-3", recorded.kept["hidden 3"])):
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
    evicted = output_logits(recorded.run, "kept-2", unembedding)
    assert divergence_from(full, full).abs().max() < 1e-5
    assert divergence_from(full, evicted)[0] < 1e-4 < divergence_from(full, evicted)[1:].min()
    assert full.argmax(-1).tolist() == list(recorded.full.requests()["output_ids"][2])


def test_the_engine_itself_refuses_what_cannot_be_had(recorded: Recorded) -> None:
    said = recorded.refusals
    assert "is for 150 positions and the prompt has 40" in said["with visible 2"]
    assert "evict: `nobody` is no kept set of this recording" in said["with nobody"]
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
            record_kept(ours, tmp_path / "run", [KeptRequest("r", prompt, key=key)], kept=file)
    assert not (tmp_path / "run").exists()
