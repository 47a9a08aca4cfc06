"""The coverage study on runs of real SGLang: its numbers are a naive loop's, its roles the renderer's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from openai import OpenAI

from sglang_probe.run.run import Run
from sglang_probe.run.weighting import Weights
from sglang_probe.studies.coverage.prompts import coverage_by_segment
from sglang_probe.studies.coverage.study import Study, study_coverage
from sglang_probe.studies.coverage.weights import write_weights
from tests.conftest import Cli
from tests.end_to_end.live_server import ADMIN_KEY, KEY, LiveServer
from tests.studies.coverage.naive import naive
from tests.studies.coverage.test_study import bin_of, compare, segment_of

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("arm", ["cache_on", "cache_off"])
def test_every_number_is_that_of_a_naive_loop(runs: dict[str, Run], arm: str) -> None:
    run = runs[arm]
    found = study_coverage(run, ["segment"], by="position")
    compare(run, found.map("segment"), naive(run.path, segment_of), lambda row: row["segment"])
    crossed = naive(run.path, lambda r, p, t: (segment_of(r, p, t), bin_of(p)))
    compare(run, found.map("segment x position"), crossed, lambda row: (row["segment"], row["position"]))
    assert found.totals["context_coverage"] == 1
    assert (found.totals["coverage"] < 1) == (arm == "cache_on")


def test_the_short_form_of_the_paired_study_agrees(runs: dict[str, Run]) -> None:
    long = study_coverage(runs["cache_on"]).map("segment").classes.set_index("segment")
    short = coverage_by_segment(runs["cache_on"].tokens()).set_index("segment").drop(index="all")
    for column in ("positions", "computed", "reused"):
        assert long[column].drop("generated").to_dict() == short[column].to_dict()


def test_both_arms_hold_the_same_traffic_and_contexts(runs: dict[str, Run]) -> None:
    axes = ["segment", "role", "lexical", "frequency", "repeat", "position", "depth"]
    on, off = (study_coverage(runs[arm], axes) for arm in ("cache_on", "cache_off"))
    for name in axes:
        a, b = on.map(name).classes, off.map(name).classes
        assert a["positions"].tolist() == b["positions"].tolist()
        assert a["contexts"].tolist() == b["contexts"].tolist()
    assert on.map("segment").bias.divergence > 0.01
    assert off.map("segment").bias.divergence == 0


def test_roles_recovered_from_ids_are_the_segments_of_the_workload(runs: dict[str, Run]) -> None:
    found = study_coverage(runs["cache_on"], ["segment", "role"])
    segment, role = (found.map(n).classes.set_index(n)["positions"] for n in ("segment", "role"))
    for name in ("system", "template", "special"):
        assert role[name] == segment[name]
    assert role["user"] + role["assistant"] == segment["user"] + segment["exemplar"] + segment["generated"]


def test_weighted_rows_have_the_class_frequencies_of_the_traffic(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["cache_on"]
    study = Study(run, ["segment"])
    path = write_weights(study, study.measure().maps, tmp_path)["segment"]
    tokens = run.tokens()
    tokens = tokens[tokens["phase"] != "overshoot"]
    rows = tokens[tokens["row"] >= 0]
    weighted = pd.Series(Weights.read(path).of(rows)).groupby(rows["segment"].to_numpy()).sum()
    traffic = tokens.groupby("segment").size()
    assert weighted.to_dict() == pytest.approx(traffic.to_dict())
    batches = list(run.iter_batches("blocks.0.hook_resid_post", batch_size=512, weight=path))
    assert abs(sum(len(b) for b in batches) - len(tokens)) <= 1


def test_the_card_has_the_paragraph(runs: dict[str, Run]) -> None:
    assert "is under-represented most" in (runs["cache_on"].path / "README.md").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    started = LiveServer(tmp_path_factory.mktemp("live"), "--admin-api-key", ADMIN_KEY, privacy="ids")
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.kill()


def test_roles_of_what_a_server_served_come_from_the_ids_alone(server: LiveServer, cli: Cli) -> None:
    server.flush()  # the server's own warm-up
    client = OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    asked: dict[str, Any] = {"model": "m", "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    system = {"role": "system", "content": "You write Python. " * 20}
    said: list[Any] = [system]
    for turn in range(3):
        said.append({"role": "user", "content": f"Write `def f{turn}(x)`."})
        answer = client.chat.completions.create(messages=said, max_tokens=8, **asked)
        said.append({"role": "assistant", "content": answer.choices[0].message.content})
    client.completions.create(prompt="def is_empty(self):", max_tokens=4, **asked)
    segment = server.flush()
    done = cli("coverage", segment, "--axis", "role", "--axis", "segment", "--output", segment.parent / "study")
    assert done.returncode == 0, done.stdout + done.stderr
    found = study_coverage(Run(segment), ["role"])
    role = found.map("role").classes.set_index("role")
    assert set(role.index) == {"system", "user", "assistant", "template", "special", "plain"}
    lengths = Run(segment).requests()["prompt_len"].tolist()
    assert role.loc["system", "positions"] % 3 == 0
    assert role.loc["system", "computed"] * 3 == role.loc["system", "positions"], "computed once, reused twice"
    assert role.loc["plain", "positions"] == lengths[3] + 4 - 1
    assert role["positions"].sum() == sum(lengths) + 3 * 7 + 3
    assert found.totals["context_coverage"] == 1
    assert found.totals["families"] == 2, "the turns of the chat, and the completion"
