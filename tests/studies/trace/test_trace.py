"""Tracing a recorded prediction: what it says of it, what it refuses, and when it may say circuit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.paths import shipped
from sglang_probe.report.page import render
from sglang_probe.run.run import Run
from sglang_probe.sae.attribution_check import Verdict
from sglang_probe.sae.folder import read_sae, write_sae
from sglang_probe.studies.trace.direct import direct
from sglang_probe.studies.trace.page import answer, direct_page, trace_page
from sglang_probe.studies.trace.setup import Setup
from sglang_probe.studies.trace.study import TraceResult, trace
from tests.rows_run import Text, write_run
from tests.sae.small import random_sae

FOLDER = shipped("models/probe-text/checkpoint")
SAE = shipped("models/sae-probe-text/seed-0")
IDS = {"a": [40, 300, 41, 500, 42, 600, 43, 700, 44, 12, 13, 300], "b": [40, 300, 9, 10, 11, 500]}
POINTS = [f"blocks.{i}.hook_resid_post" for i in (2, 3)]


def rows() -> dict[str, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    found: dict[str, dict[str, torch.Tensor]] = {p: {} for p in POINTS}
    for rid, ids in IDS.items():
        for layer, point in zip((2, 3), POINTS, strict=True):
            module = model.model.layers[layer]
            module.register_forward_hook(
                lambda _m, _a, out, p=point, r=rid: found[p].__setitem__(
                    r, (out[0] if isinstance(out, tuple) else out)[0]
                )
            )
        with torch.no_grad():
            model(torch.tensor([ids]))
        for layer in (2, 3):
            model.model.layers[layer]._forward_hooks.clear()
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, torch.Tensor]]:
    return rows()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recorded: dict[str, dict[str, torch.Tensor]]) -> Run:
    texts = {rid: Text(ids, (77,)) for rid, ids in IDS.items()}
    place = tmp_path_factory.mktemp("trace") / "run"
    return write_run(place, texts, recorded, model=FOLDER, model_config={"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def last_sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the last layer."""
    folder = tmp_path_factory.mktemp("sae") / "last"
    sae = random_sae("standard", 256, 32).with_metadata(hook_name=POINTS[1])
    write_sae(sae, folder)
    return folder


@pytest.fixture(scope="module")
def traced(run: Run, last_sae: Path) -> TraceResult:
    return trace(run.path, [SAE, last_sae], rid="a", top=6, random=3)


def test_the_target_is_what_was_recorded_and_the_foil_the_likeliest_other(traced: TraceResult, run: Run) -> None:
    by_number = trace(run.path, [SAE], rid="a", target="#77", top=2, random=2)
    assert traced.target == by_number.target
    assert traced.metric == pytest.approx(by_number.metric, abs=1e-5)
    assert traced.foil == traced.said  # nothing is likelier than it, and it is not the target
    assert traced.position == len(IDS["a"]) - 1


def test_rows_computed_here_are_those_that_were_recorded(
    traced: TraceResult, tmp_path: Path, recorded: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert traced.sites["recorded"].max() < 1e-5
    assert not any("differ" in n for n in traced.notes)
    others = {
        p: {r: x + 0.1 * x.norm(dim=1, keepdim=True) * torch.ones_like(x) / 16 for r, x in of.items()}
        for p, of in recorded.items()
    }
    texts = {rid: Text(ids, (77,)) for rid, ids in IDS.items()}
    other = write_run(tmp_path / "run", texts, others, model=FOLDER, model_config={"num_hidden_layers": 4})
    found = trace(other.path, [SAE], rid="a", top=2, random=2)
    assert found.sites["recorded"].max() > 0.05
    assert any("may not be what was served" in n for n in found.notes)


def test_the_last_position_alone_reaches_the_answer_from_the_last_layer(traced: TraceResult) -> None:
    last = traced.positions[traced.positions["layer"] == 3]
    assert (last[last["position"] < traced.position]["all"] == 0).all()
    assert float(last[last["position"] == traced.position]["all"].abs().iloc[0]) > 0
    to_output = traced.edges[traced.edges["target"] == "output"]
    of_node = traced.nodes.set_index("node")["gradient"]
    assert to_output["value"].tolist() == pytest.approx(of_node.loc[to_output["source"]].tolist())


def _with_verdict(result: TraceResult, *failures: str) -> TraceResult:
    return replace(result, verdict=Verdict(0.9, 0.001, 0.001, 0.025, 0.1, failures))


@pytest.mark.parametrize("passes", [True, False])
def test_the_word_circuit_appears_only_where_the_check_passed(traced: TraceResult, passes: bool) -> None:
    found = _with_verdict(traced, *([] if passes else ["top nodes do no more"]))
    assert found.circuit is passes
    html = render(trace_page(found))
    assert ("Circuit of" in html) is passes
    assert ("may be called a circuit" in answer(found)) is passes
    assert found.to_json()["check"]["passed"] is passes


def test_a_trace_of_nothing_has_a_page(traced: TraceResult) -> None:
    frames = {n: getattr(traced, n).iloc[:0] for n in ("sites", "nodes", "positions", "edges", "ablations")}
    for found in (
        replace(traced, verdict=None, joint={}, **frames),
        replace(traced, edges=traced.edges.iloc[:0], ablations=traced.ablations.iloc[:1]),
    ):
        html = render(trace_page(found))
        assert not re.search(
            r">[^<>]*\b(nan|None|NaT|inf)\b[^<>]*<", re.sub(r"<style>.*?</style>", "", html, flags=re.S)
        )


def test_one_ablation_by_hand(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    sae = read_sae(SAE)
    traced = trace(run.path, [SAE], rid="a", top=6, random=2)
    ablated = traced.ablations[traced.ablations["kind"] == "feature"]
    node = traced.nodes.set_index("node").loc[ablated["node"].iloc[0]]
    at, latent = int(node["position"]), int(node["latent"])

    def ablate(_m: Any, _a: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[0, at] -= sae.encode(x[0, at])[latent] * sae.W_dec[latent]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    with torch.no_grad():
        clean = model(torch.tensor([IDS["a"]])).logits[0, -1]
        foil = int(clean.argmax())
        handle = model.model.layers[2].register_forward_hook(ablate)
        without = model(torch.tensor([IDS["a"]])).logits[0, -1]
        handle.remove()
    lost = float((clean[77] - clean[foil]) - (without[77] - without[foil]))
    assert ablated["true"].iloc[0] == pytest.approx(lost, abs=1e-4)
    assert traced.metric == pytest.approx(float(clean[77] - clean[foil]), abs=1e-4)


def test_means_are_a_baseline_only_where_there_are_rows(run: Run, last_sae: Path, tmp_path: Path) -> None:
    found = trace(run.path, [SAE], rid="a", baseline="mean", steps=20, top=3, random=2)
    assert found.sites["gap"].max() < 0.02
    sae = replace_hook(last_sae, tmp_path / "elsewhere", "blocks.1.hook_resid_post")
    with pytest.raises(ConfigError, match=r"no rows of `blocks\.1"):
        trace(run.path, [sae], rid="a", baseline="mean")
    bare = trace(run.path, [sae], rid="a", top=2, random=2)
    assert any("named by what they promote alone" in n for n in bare.notes)


def replace_hook(folder: Path, to: Path, hook_point: str) -> Path:
    write_sae(read_sae(folder).with_metadata(hook_name=hook_point), to)
    return to


def test_after_the_last_layer_direct_attribution_sums_to_the_metric(
    run: Run, last_sae: Path, traced: TraceResult
) -> None:
    found = direct(run.path, [SAE, last_sae], rid="a")
    assert (found.target, found.foil) == (traced.target, traced.foil)
    assert found.metric == pytest.approx(traced.metric, rel=1e-3)
    sums = found.layers.set_index("layer")["all"]
    assert sums[3] == pytest.approx(found.metric, rel=1e-4)
    assert abs(sums[2] - found.metric) > 0.01  # layer 3 did the rest
    html = render(direct_page(found)).lower()
    assert "direct logit attribution" in html
    assert "circuit" not in html
    assert found.to_json()["method"] == "direct logit attribution"


def test_direct_attribution_needs_the_recorded_rows(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"no row of `blocks.3.hook_resid_post` at position 12"):
        direct(run.path, [SAE], rid="a", position=12, target="#5")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rid": "z"}, "no request `z`"),
        ({"rid": "a", "position": 99}, "has the positions 0 to 12"),
        ({"rid": "a", "target": "#5", "foil": "#5"}, "same token"),
        ({"rid": "a", "position": 12}, "nothing was recorded after position 12"),
        ({"rid": "a", "foil": "no such token"}, "not one token"),
    ],
)
def test_what_cannot_be_traced_is_refused(run: Run, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trace(run.path, [SAE], **given)


@pytest.mark.parametrize(("prompt", "output"), [((1, -1, 3), (4, 5)), ((1, 2, 3), (-1, 5))])
def test_what_was_withheld_is_no_token(prompt: tuple[int, ...], output: tuple[int, ...]) -> None:
    requests = pd.DataFrame({"rid": ["r"], "prompt_ids": [np.array(prompt)], "output_ids": [np.array(output)]})
    scrubbed: Any = SimpleNamespace(path="run", requests=lambda: requests)
    nothing: Any = None
    with pytest.raises(ConfigError, match="tokens of `r` were withheld"):
        Setup(scrubbed, nothing, nothing, [], nothing, "zero").recorded("r")


def test_two_saes_of_a_layer_are_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="two SAEs read"):
        trace(run.path, [SAE, shipped("models/sae-probe-text/seed-1")], rid="a")


def test_the_command_leaves_page_summary_and_tables(cli: Callable, run: Run, tmp_path: Path) -> None:
    given = ("--sae", SAE, "--rid", "a", "--top", "3", "--random", "2", "--output", tmp_path / "out", "--json")
    done = cli("trace", run.path, *given)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["ablations"]) == 3 + 3 * 2
    assert np.isfinite(told["check"]["error_share"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert {p.name for p in (tmp_path / "out" / "tables").glob("*.csv")} == {
        f"{n}.csv" for n in ("nodes", "positions", "edges", "ablations", "sites")
    }
