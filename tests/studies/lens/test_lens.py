"""The lens says what `transformers` says of its own hidden states, and where a token can first be read off."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run
from sglang_probe.studies.lens.measure import read, settled
from sglang_probe.studies.lens.study import lens, token_of
from tests.rows_run import Text, write_run

FOLDER = shipped("models/probe-text/checkpoint")
PROMPTS = {"a": [40, 300, 41, 500, 42, 600, 43, 700], "b": [40, 300, 41, 500, 9, 10]}


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[int, torch.Tensor]]:
    """Logits of each request by layer, from `transformers`, and the rows that they come from under `rows`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    caught: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _m, _a, out, i=i: caught.__setitem__(i, (out[0] if isinstance(out, tuple) else out)[-1:].squeeze(0))
        )
    found: dict[str, dict[int, torch.Tensor]] = {"rows a": {}, "rows b": {}}
    with torch.no_grad():
        for rid, prompt in PROMPTS.items():
            ids = [*prompt, *([800, 801] if rid == "a" else [])]
            said = model(torch.tensor([ids]), output_hidden_states=True)
            found[f"rows {rid}"] = dict(caught)
            # Its hidden states are the embedding and the stream after each layer but the last, which comes normed.
            states = [*said.hidden_states[1:-1]]
            found[rid] = {i: model.lm_head(model.model.norm(h))[0] for i, h in enumerate(states)}
            found[rid][len(states)] = said.logits[0]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, reference: dict[str, dict[int, torch.Tensor]]) -> Run:
    """`b` reuses four positions of `a`, which goes on for two tokens."""
    texts = {
        "a": Text(PROMPTS["a"], (800, 801, 802)),
        "b": Text(PROMPTS["b"], (11,), reuses=("a", 4)),
    }
    rows = {f"blocks.{i}.hook_resid_post": {r: reference[f"rows {r}"][i] for r in "ab"} for i in range(4)}
    place = tmp_path_factory.mktemp("lens") / "run"
    return write_run(place, texts, rows, model=FOLDER, model_config={"num_hidden_layers": 4})


def test_the_lens_is_the_head_of_transformers_on_its_hidden_states(
    run: Run, reference: dict[str, dict[int, torch.Tensor]]
) -> None:
    found = lens(run.path).readings.set_index(["rid", "position", "layer"])
    assert len(found) == (10 + 2) * 4
    after = {"a": [*PROMPTS["a"], 800, 801, 802], "b": [*PROMPTS["b"], 11]}
    for (rid, position, layer), row in found.iterrows():
        log = torch.log_softmax(reference[rid][layer][position].double(), -1)
        final = torch.log_softmax(reference[rid][3][position].double(), -1)
        target = after[rid][position + 1]
        assert row["top_token"] == int(log.argmax())
        assert row["entropy"] == pytest.approx(float(-(log.exp() * log).sum()), rel=1e-4)
        assert row["kl"] == pytest.approx(float((final.exp() * (final - log)).sum()), rel=1e-3, abs=1e-5)
        assert row["rank"] == 1 + int((log > log[target]).sum())
        assert row["log_likelihood"] == pytest.approx(float(log[target]), rel=1e-4)


def test_the_map_tells_gathered_rows_from_computed_ones(
    run: Run, reference: dict[str, dict[int, torch.Tensor]]
) -> None:
    shown = lens(run.path, rid="b", start=0).map
    first = shown[shown["layer"] == 2].set_index("position")
    assert first["row"].tolist() == ["gathered"] * 4 + ["computed"] * 2
    # What is gathered is what `a` had there: the same tokens over the same prefix.
    assert first.loc[2, "top_token"] == int(reference["a"][2][2].argmax())
    assert first["next"].tolist()[-1] == Vocabulary.load(FOLDER).text(11)


def test_a_target_of_ones_own_is_ranked_everywhere(run: Run, reference: dict[str, dict[int, torch.Tensor]]) -> None:
    text = Vocabulary.load(FOLDER).text(500)
    found = lens(run.path, target=text).readings
    row = found[(found["rid"] == "a") & (found["position"] == 3) & (found["layer"] == 1)].iloc[0]
    logits = reference["a"][1][3]
    assert row["rank"] == 1 + int((logits > logits[500]).sum())
    assert found["rank"].notna().all()


def test_without_the_last_layer_there_is_nothing_to_agree_with(
    tmp_path: Path, reference: dict[str, dict[int, torch.Tensor]]
) -> None:
    rows = {"blocks.1.hook_resid_post": {"a": reference["rows a"][1]}}
    run = write_run(
        tmp_path / "run", {"a": Text(PROMPTS["a"])}, rows, model=FOLDER, model_config={"num_hidden_layers": 4}
    )
    found = lens(run.path)
    assert found.final is None
    assert found.readings["kl"].isna().all()
    assert found.settling.empty
    assert "last layer was not captured" in " ".join(found.notes)


def test_another_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((FOLDER / file).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ConfigError, match="other weights"):
        lens(run.path, model=tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rid": "z"}, "no request `z`"),
        ({"rid": "a", "start": 99}, "no rows of these layers from position 99"),
        ({"where": "phase =="}, "cannot be used"),
        ({"where": "position > 99"}, "no position"),
        ({"target": "no such token at all"}, "not one token"),
        ({"target": "#999999"}, "no token 999999"),
    ],
)
def test_what_is_not_there_is_said(run: Run, given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lens(run.path, **given)  # type: ignore[arg-type]


def test_a_token_is_named_by_its_text_or_its_number() -> None:
    vocabulary = Vocabulary.load(FOLDER)
    assert token_of(vocabulary.text(500), vocabulary) == 500
    assert token_of("#500", vocabulary) == 500


def test_numbers_of_a_prediction_that_can_be_worked_out_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25, 1e-12]]), torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    found = read(q.log(), np.array([2]), np.array([-1]), p.log())
    assert found.entropy[0] == pytest.approx(0.25 * math.log(4) + 0.5 * math.log(2) + 0.25 * math.log(8), rel=1e-6)
    assert found.kl[0] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2) + 0.25 * math.log(2), rel=1e-5)
    assert found.rank[0] == 3  # two are likelier; what is as likely as the target is not
    assert np.isnan(found.other_rank[0])
    assert (found.top[0], found.probability[0]) == (1, pytest.approx(0.5))


def test_a_position_is_settled_after_the_last_layer_that_says_something_else() -> None:
    agrees = np.array([[1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0]], dtype=bool)
    assert settled(agrees).tolist() == [2, 2, 0, 3]


def test_the_command_leaves_page_summary_and_tables(cli: Callable, run: Run, tmp_path: Path) -> None:
    done = cli("lens", run.path, "--rid", "b", "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["positions"] == 12
    assert [r["agreement"] for r in told["layers"] if r["phase"] == "all"][-1] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert 'class="scroll tokens"' in page
    assert {p.name for p in (tmp_path / "out" / "tables").glob("*.csv")} >= {"layers.csv", "readings.csv", "map.csv"}
