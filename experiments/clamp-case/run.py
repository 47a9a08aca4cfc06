"""The worked case: a planted behaviour, found by an SAE, shown to hang on a feature, clamped by a gate, audited.

    python experiments/clamp-case/run.py [--seed 0] [--folder runs/clamp-case] [--report-only]

Stages that are done are kept: train the model, capture (engine), where the behaviour is decided, train dictionaries
(SAELens, the extra `[sae]`), choose a feature and a value by causal effect on selection objects, arms on held-out
objects (engine), manifest, two real servers without and with the clamp and its gate, audit replay (engine), report.
Writes `summary.json` and `report.html` into the folder, and copies the summary beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import audit
import serve
import torch
import yaml
from causal import Net, where_decided
from choose import HELD_OUT, LAYERS_TRIED, Chooser, point
from dialogues import NAMES, SPLIT, Dialogue
from model import TRAINING_NAMES, train
from page import report
from traffic import dialogues, outcome, per_object, requests

from sglang_probe.config import parse_config
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.report.page import write
from sglang_probe.run.journal import sha256
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.sae.folder import weights_sha256
from sglang_probe.steering import library as vectors
from sglang_probe.steering import probe
from sglang_probe.steering.features import FeatureManifest, read_features, write_features
from sglang_probe.steering.library import weight_hash_of_folder
from sglang_probe.steering.make import Target, sae_feature
from sglang_probe.workload.build import Workload

HERE = Path(__file__).parent
FPR = 0.021
CAPTURED = {"content": 240, "story": 160, "refused": 120, "split": 120}
TESTED = {"content": 60, "story": 48, "refused": 48, "split": 72}
PLAIN, CLAMP, CONTROL, CONTRAST = "plain", "clamp", "control", "contrast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the model that is trained")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--report-only", action="store_true", help="read what is there, and draw the report again")
    args = parser.parse_args()
    folder = args.folder or Path("runs") / f"clamp-case-{args.seed}"
    if not args.report_only:
        folder.mkdir(parents=True, exist_ok=True)
        summary = case(folder, args.seed)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        shutil.copyfile(folder / "summary.json", HERE / f"seed-{args.seed}.summary.json")
    summary = json.loads((folder / "summary.json").read_text())
    write(report(summary), folder / "report.html")
    sys.stdout.write(json.dumps(summary["production"], indent=1) + "\n")


def case(folder: Path, seed: int) -> dict[str, Any]:
    """All stages; what they found."""
    model, library = folder / "model", folder / "library"
    trained = kept(folder / "model.json", lambda: train(model, seed))
    captured = capture(folder, model)
    drawn = dialogues(CAPTURED, "capture", TRAINING_NAMES)
    saes = {layer: sae(folder, layer) for layer in LAYERS_TRIED}
    chosen = kept(folder / "chosen.json", lambda: choose(model, saes, drawn))
    layer = chosen["layer"]
    gate = kept(folder / "gate.json", lambda: make_library(library, captured, saes[layer], chosen))
    tests = dialogues(TESTED, "test of the third attempt", NAMES)
    runs = arms(folder, model, library, chosen, tests)
    halves = {"held out": HELD_OUT, "all": SPLIT}
    effect = {
        name: {half: per_object(runs[PLAIN], runs[name], tests, of) for half, of in halves.items()}
        for name in (CLAMP, CONTROL, CONTRAST)
    }
    features = manifest(folder, model, saes[layer], chosen, effect, runs[CLAMP])
    told = {
        "model": trained,
        "where": chosen.pop("where"),
        "frontier": chosen.pop("frontier"),
        "chosen": {k: v for k, v in chosen.items() if k != "direction"},
        "gate": gate,
        "arms": {name: outcome(runs[PLAIN], run, tests) for name, run in runs.items()},
        "effect": effect,
        "manifest": {"revision": features.revision, "sha256": features.sha256, "status": features.features[0].status},
    }
    if features.features[0].status == "hypothesis":
        return {**told, "production": None, "audit": None}
    places = {"manifest": folder / "features.json", "sae": saes[layer]}
    clamp = {**{k: str(p.resolve()) for k, p in places.items()}, "feature": chosen["feature"], "probe": "scope"}
    steer = {"library": str(library.resolve()), "clamps": [clamp]}
    given = serve.served(folder, model, ["hook_embed", point(layer)], steer, tests)
    production = {way: in_production(given, way, layer, tests) for way in serve.AT_A_TIME}
    segment = Path(given[f"{serve.CLAMPED} alone"]["segment"])
    audited = kept(folder / "audit.json", lambda: audit.audited(folder, features, segment, library, saes[layer], model))
    return {**told, "production": production, "audit": audited}


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found before, or is found now."""
    if not file.exists():
        found = make()
        file.write_text(json.dumps(found))
    return dict(json.loads(file.read_text()))


def prepared(model: Path, library: Path | None, layers: Sequence[int]) -> Prepared:
    config = {
        "model": str(model.resolve()),
        "dtype": "float32",
        "hook_points": ["hook_embed", *map(point, layers)],
        "concurrency": 16,
        "server": {"max_total_tokens": 8192},
        "steer": None if library is None else {"library": str(library.resolve())},
    }
    workload = Workload(tuple(requests(dialogues(TESTED, "any", NAMES))))
    return prepare(Recording.model_validate(config), workload=workload)


def capture(folder: Path, model: Path) -> dict[str, Run]:
    """Replies of the model to requests in scope (about forbidden objects) and others, with their rows."""
    drawn = dialogues(CAPTURED, "capture", TRAINING_NAMES)
    inside = [d for d in drawn if d.kind in ("refused", "split")]
    outside = [d for d in drawn if d.kind not in ("refused", "split")]
    specs = [RunSpec("scope", requests(inside)), RunSpec("other", requests(outside))]
    return record(specs, prepared(model, None, LAYERS_TRIED), folder / "captured", resume=True)


def sae(folder: Path, layer: int) -> Path:
    """A dictionary of the captured rows of generated tokens: those that a clamp acts on."""
    made = folder / f"sae-{layer}"
    if not (made / "summary.json").exists():
        config = {
            "runs": [str((folder / "captured" / name).resolve()) for name in ("scope", "other")],
            "hook_point": point(layer),
            "where": "phase == 'decode'",
            "k": 2,
            "latents": [32],
            "samples": 60_000,
            "batch_size": 256,
        }
        (folder / f"sae-{layer}.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "sglang_probe", "sae", "train", str(folder / f"sae-{layer}.yaml")]
        subprocess.run([*command, "--output", str(made), "--resume"], check=True)
    return next(p.parent for p in sorted(made.glob("*/cfg.json")))


def choose(model: Path, saes: dict[int, Path], drawn: Sequence[Dialogue]) -> dict[str, Any]:
    """Where the behaviour is decided; the feature and its value; and the frontier of arms on held-out objects."""
    chooser = Chooser(Net(model), saes, drawn)
    where = where_decided(chooser.net, *chooser.pairs())
    chosen = chooser.choose()
    frontier = chooser.frontier(chosen)
    clamp = next(r for r in frontier if r["arm"] == "feature clamped" and r["dose"] == chosen["multiple"])
    # The strongest cap of the contrastive direction with no more side effects than the clamp, held-out effects unseen.
    caps = [r for r in frontier if r["arm"] == "contrast capped"]
    within = [r for r in caps if all(r[k] <= clamp[k] for k in ("kl_content", "kl_story"))]
    cap = min(within or caps[:1], key=lambda r: r["dose"])
    found = {"where": where, "frontier": frontier, "cap": {"dose": cap["dose"], "within": bool(within)}}
    return {**chosen, **found, **chooser.contrast(chosen)}


def make_library(library: Path, captured: dict[str, Run], sae_folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """The feature, its control, the contrastive direction, and the probe of the gate; what is known of the gate."""
    shutil.rmtree(library, ignore_errors=True)
    scope = captured["scope"]
    for name in ("feature", "control"):
        entry = sae_feature(Target(library, name), sae_folder, chosen[name], scope, trust=True)
    vectors.write(
        library,
        {vectors.VECTOR: torch.tensor(chosen["direction"])},
        name=CONTRAST,
        kind="direction",
        hook_point=point(chosen["layer"]),
        model=entry.card.model,
        model_weight_hash=entry.card.model_weight_hash,
        layer_mean_norm=entry.card.layer_mean_norm,
        made_by={"command": "experiments/clamp-case", "inputs": {"rows": "the header's last, of selection objects"}},
        evidence={},
    )
    gate = probe.write(Target(library, "scope"), scope, captured["other"], point(chosen["layer"]), fpr=FPR)
    return {k: v for k, v in dict(gate.card.evidence).items() if k != "roc"}


def arms(folder: Path, model: Path, library: Path, chosen: dict[str, Any], tests: Sequence[Dialogue]) -> dict[str, Run]:
    """The test requests in one engine: plain, the feature clamped, its control, and the contrastive direction capped.
    No gate of intent: what each does by itself."""
    clamp = {"op": "clamp", "strength": chosen["value"], "phases": ["decode"], "gate": {"by": "feature"}}
    low, high = chosen["projections"]
    cap = low + chosen["cap"]["dose"] * (high - low)
    asked: dict[str, list[dict[str, Any]]] = {
        PLAIN: [],
        CLAMP: [{"vector": "feature", **clamp}],
        CONTROL: [{"vector": "control", **clamp}],
        CONTRAST: [{"vector": CONTRAST, "op": "cap", "strength": cap, "phases": ["decode"]}],
    }
    specs = [RunSpec(name, requests(tests, steer)) for name, steer in asked.items()]
    with EngineHost() as host:
        return record(specs, prepared(model, library, [chosen["layer"]]), folder / "arms", host=host, resume=True)


def manifest(
    folder: Path, model: Path, sae_folder: Path, chosen: dict[str, Any], effect: dict[str, Any], run: Run
) -> FeatureManifest:
    """`features.json`: the feature with its evidence from held-out objects; `validated` if that shows an effect."""
    path = folder / "features.json"
    if path.exists():
        return read_features(path)
    clamp = next(r for r in chosen["frontier"] if r["arm"] == "feature clamped" and r["dose"] == chosen["multiple"])
    evidence = {
        "run": "clamp",
        "manifest_sha256": sha256(run.path / MANIFEST),
        "measure": "share of replies that are the refusal and nothing else",
        "dose": chosen["value"],
        "unit": "absolute",
        **effect[CLAMP]["held out"],
        "control": effect[CONTROL]["held out"]["effect"],
        "side_effect": max(clamp["kl_content"], clamp["kl_story"]),
    }
    told = {
        "model": "clamp-case",
        "model_weight_hash": weight_hash_of_folder(model),
        "hook_point": point(chosen["layer"]),
        "sae_sha256": weights_sha256(sae_folder),
        "features": [
            {
                "index": chosen["feature"],
                "label": "content follows the refusal",
                "labelled": {"by": "human", "name": "clamp-case"},
                "owner": "clamp-case",
                "evidence": [evidence],
                "clamp": {"mode": "clamp", "value": chosen["value"], "threshold": 0.0},
            }
        ],
    }
    found = parse_config(told, FeatureManifest, where="features.json")
    if not found.features[0].evidence[0].shows_an_effect:
        write_features(found, path)
        return found
    first = folder / "features.first.json"
    first.unlink(missing_ok=True)
    write_features(found, first)
    shutil.copyfile(first, path)
    moved = found.moved(chosen["feature"], "validated")
    write_features(moved, path)
    return moved


def in_production(given: dict[str, Any], way: str, layer: int, tests: Sequence[Dialogue]) -> dict[str, Any]:
    """Before and after, by kind, and what it did to who is out of scope."""
    runs = {name: serve.load_run(given[f"{name} {way}"]["segment"]) for name in (serve.PLAIN, serve.CLAMPED)}
    told = {name: outcome(runs[serve.PLAIN], run, tests) for name, run in runs.items()}
    halves = {"held out": HELD_OUT, "all": SPLIT}
    effect = {half: per_object(runs[serve.PLAIN], runs[serve.CLAMPED], tests, of) for half, of in halves.items()}
    return {**told, "effect": effect, "collateral": serve.collateral(given, way, point(layer))}


if __name__ == "__main__":
    main()
