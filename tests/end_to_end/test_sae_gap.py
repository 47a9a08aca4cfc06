"""The reconstruction gap end to end: rows replaced in the engine while the same tokens are decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sglang_probe.paths import shipped
from sglang_probe.run.run import load_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.steering.library import Library
from sglang_probe.verify.reference import compare
from tests.declared import run_commands
from tests.end_to_end.steering import MODEL
from tests.sae.lens import needs_sae_lens

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("steering")]
P, C = 40, 24
SAE = shipped("models/sae-probe-text/seed-0")


@pytest.fixture(scope="module")
def study(cli: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The YAML and the folder of its results."""
    folder = tmp_path_factory.mktemp("gap")
    config = folder / "gap.yaml"
    fields = {
        "sae": str(SAE),
        "dtype": "float32",
        "workload": {"source": "documents", "count": 8, "chars": 600, "seed": 3},
        "prompt_tokens": P,
        "continuation_tokens": C,
        "most_texts": 6,
        "concurrency": 3,
    }
    config.write_text(yaml.safe_dump(fields))
    done = cli("sae", "gap", config, "--output", folder / "study")
    assert done.returncode == 0, done.stdout + done.stderr
    return config, folder / "study"


@needs_sae_lens
def test_saelens_replaces_the_same_rows_at_the_same_cost(cli: Callable, study: tuple[Path, Path]) -> None:
    _, folder = study
    options = ["--against", "saelens", "--gap", folder, "--texts", "6", "--output", folder / "eval", "--json"]
    done = cli("sae", "eval", SAE, folder / "human", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    table = pd.DataFrame(told["against"])
    same = table[table["why"].str.startswith("one definition")].set_index("quantity")
    assert len(same) == 4 + 6
    assert (same["difference"].abs() < 1e-4 * same["ours"].abs()).all()
    effects = pd.DataFrame(json.loads((folder / "summary.json").read_text())["effects"])
    human = effects.set_index(["kind", "replaced_by"]).loc[("human", "sae")]
    assert same.loc["cross-entropy recovered", "ours"] == pytest.approx(human["recovered_zero"], rel=1e-6)
    other = table[~table["why"].str.startswith("one definition")]
    sinks_in = other[other["why"].str.contains("forward pass")]
    assert (sinks_in["difference"].abs() < 1e-5).all()  # what explains the difference of the three before
    assert other[other["quantity"] == "cross-entropy recovered"]["difference"].abs().item() > 1e-3
    assert not [n for n in told["notes"] if "compared" in n]


def test_rows_are_replaced_in_the_phase_at_hand_and_the_study_says_what_it_costs(
    cli: Callable, study: tuple[Path, Path]
) -> None:
    config, folder = study
    runs = {p.parent.name: load_run(p.parent) for p in folder.glob("*/manifest.json")}
    assert len(runs) == 6 + 8
    outputs = {n: r.requests().set_index("rid")["output_ids"].map(list) for n, r in runs.items()}
    library = list(Library.open(folder / "library").values())
    for variant in ("sae", "random", "mean", "zero"):
        run = runs[f"decoded.{variant}"]
        assert (outputs[f"decoded.{variant}"] == outputs["decoded"]).all()
        tokens = run.tokens()
        assert (tokens["intervention"].notna() == (tokens["position"] >= P)).all()
        if variant == "zero":  # nothing has a relative error to a row of zeros
            continue
        found = compare(run, str(MODEL), requests=6, vectors=library)
        assert found.intervened == 6
        assert found.undecided < len(tokens) / 3
        assert max(float(e.max()) for e in found.by_hook_point.values()) < 1e-4
    _replaced(runs, folder)
    result = json.loads((folder / "summary.json").read_text())
    assert result["ok"]
    effects = pd.DataFrame(result["effects"]).set_index(["kind", "replaced_by"])
    for kind in ("human", "decoded"):
        nll = effects.loc[kind]["nll"]
        assert effects.loc[(kind, "sae"), "clean"] < nll["sae"] < nll["mean"] < nll["zero"]
        assert 0 < effects.loc[(kind, "random"), "kl"] < effects.loc[(kind, "mean"), "kl"]
        assert 0.5 < effects.loc[(kind, "sae"), "recovered_mean"] < 1
    gaps = pd.DataFrame(result["gaps"]).set_index(["contrast", "texts"])
    assert abs(gaps.loc[("numerics", "all"), "gap"]) < 1e-4 < abs(gaps.loc[("content", "all"), "gap"])
    again = cli("sae", "gap", config, "--output", folder, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting SGLang" not in again.stdout
    read = ["sae", "gap", str(config), "--output", str(folder), "--report-only"]
    assert list(run_commands([read]).values()) == [0]


def _replaced(runs: dict, folder: Path) -> None:
    """Captured rows of the hook point are those after: the mean row, zero, and what is the SAE's of the row itself."""
    point = "blocks.2.hook_resid_post"
    mean = read_sae(folder / "library" / "mean-row").b_dec

    def rows(name: str) -> object:
        tokens = runs[name].tokens()
        tokens = tokens[(tokens["position"] >= P) & (tokens["position"] < P + C)].sort_values(["rid", "position"])
        return runs[name].rows(point, tokens["row"].to_numpy())

    clean, spliced = rows("human"), rows("human.sae")
    assert float((rows("human.mean") - mean).abs().max()) < 1e-4  # type: ignore[operator]
    assert float(rows("human.zero").abs().max()) < 1e-4  # type: ignore[attr-defined]
    made = read_sae(SAE).reconstruct(clean[:1])  # type: ignore[index]
    assert float((spliced[:1] - made).norm() / made.norm()) < 1e-4  # type: ignore[index]
