"""The worked case: a planted behaviour, found by an SAE and as a direction, shown to hang on one of them, clamped by a
gate, audited.

    python experiments/clamp-case/run.py [--seed 0] [--folder runs/clamp-case] [--report-only]

Stages that are done are kept: train the model, capture (engine), where the behaviour is decided, train dictionaries
(SAELens, the extra `[sae]`), choose a feature and a direction with their values by causal effect on selection objects,
arms on held-out objects (engine), manifest, two real servers without and with the direction capped where a gate opens,
audit replay (engine), report.
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
from causal import LAYERS, Net, where_decided
from choose import HELD_OUT, LAYERS_TRIED, SELECTION, Chooser, point
from dialogues import HEADER, NAMES, SPLIT, Dialogue
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
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.sae.folder import weights_sha256
from sglang_probe.steering import contrast, make, probe
from sglang_probe.steering.features import Direction, FeatureManifest, read_features, write_features
from sglang_probe.steering.library import Library
from sglang_probe.steering.make import Target
from sglang_probe.workload.build import Workload

HERE = Path(__file__).parent
FPR = 0.021
CAPTURED = {"content": 240, "story": 160, "refused": 120, "split": 120}
TESTED = {"content": 60, "story": 48, "refused": 48, "split": 72}
PLAIN, CLAMP, CONTROL, CONTRAST = "plain", "clamp", "control", "contrast"
RANDOM = [f"random-{i}" for i in range(5)]
"""Directions drawn from the residual's covariance, of the length of the contrastive one: its controls."""
GOES_ON, ENDS = "goes-on", "ends"
"""Runs that the contrastive direction is made of: refusals cut off after the token that decides."""


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
    made = kept(folder / "library.json", lambda: make_library(library, captured, saes[layer], chosen))
    tests = dialogues(TESTED, "test of the fourth attempt", NAMES)
    runs = arms(folder, model, library, chosen, made, tests)
    halves = {"held out": HELD_OUT, "all": SPLIT}
    effect = {
        name: {half: per_object(runs[PLAIN], run, tests, of) for half, of in halves.items()}
        for name, run in runs.items()
        if name != PLAIN
    }
    features = manifest(folder, model, library, saes[layer], chosen, effect, runs)
    told = {
        "model": trained,
        "where": chosen.pop("where"),
        "frontier": chosen.pop("frontier"),
        "chosen": {k: v for k, v in chosen.items() if k != "direction"},
        "library": made,
        "arms": {name: outcome(runs[PLAIN], run, tests) for name, run in runs.items()},
        "effect": effect,
        "manifest": {
            "revision": features.revision,
            "sha256": features.sha256,
            "status": {e.title: e.status for e in features.entries},
        },
    }
    if features.entry(CONTRAST).status == "hypothesis":
        return {**told, "production": None, "audit": None}
    clamp = {"manifest": str((folder / "features.json").resolve()), "direction": CONTRAST, "probe": "scope"}
    steer = {"library": str(library.resolve()), "clamps": [clamp]}
    points = sorted({point(layer), point(LAYERS - 1)})
    given = serve.served(folder, model, ["hook_embed", *points], steer, tests)
    production = {way: in_production(given, way, points, tests) for way in serve.AT_A_TIME}
    segment = Path(given[f"{serve.CLAMPED} alone"]["segment"])
    audited = kept(
        folder / "audit.json",
        lambda: audit.audited(folder, features, segment, library, model, CONTRAST, RANDOM[0]),
    )
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
    # One token past the header, whose row is the last that is computed.
    new = len(HEADER) + 1
    specs.append(RunSpec(GOES_ON, requests([d for d in inside if d.object in SELECTION], new=new)))
    specs.append(RunSpec(ENDS, requests([d for d in inside if d.kind == "refused"], new=new)))
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
    chosen |= chooser.contrast(chosen["layer"])
    return {**chosen, "where": where, "frontier": chooser.frontier(chosen)}


def make_library(library: Path, captured: dict[str, Run], sae_folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """The feature and its control, the contrastive direction and its controls, and the probe of the gate; what is known
    of the gate and of the direction, and where the controls are capped.

    A control is capped where that changes the row in which it is decided by as much as the direction's cap does, on
    average over selection texts.
    """
    shutil.rmtree(library, ignore_errors=True)
    scope, at = captured["scope"], point(chosen["layer"])
    for name in ("feature", "control"):
        make.sae_feature(Target(library, name), sae_folder, chosen[name], scope, trust=True)
    on, off = captured[GOES_ON], captured[ENDS]
    direction = make.mean_difference(Target(library, CONTRAST), on, off, at, phase="decode", place="last")
    by_hooks = torch.tensor(chosen["direction"])
    cosine = float(torch.cosine_similarity(direction.vector.double(), by_hooks.double(), dim=0))
    x_ND = torch.from_numpy(contrast.rows_of(on, at, phase="decode", place="last").x_ND)
    low, high = chosen["projections"]
    change = high - chosen["cap"]["value"]
    caps = {}
    for seed, name in enumerate(RANDOM):
        u = make.random_control(Target(library, name), scope, at, seed=seed, like=direction).vector.double()
        caps[name] = float((x_ND @ (u / u.norm())).mean()) - change
    gate = probe.write(Target(library, "scope"), scope, captured["other"], at, fpr=FPR)
    return {
        "gate": {k: v for k, v in dict(gate.card.evidence).items() if k != "roc"},
        "direction": {"evidence": direction.card.evidence, "norm": direction.card.norm, "cosine_with_hooks": cosine},
        "way": high - low,
        "change": change,
        "random_caps": caps,
    }


def arms(
    folder: Path,
    model: Path,
    library: Path,
    chosen: dict[str, Any],
    made: dict[str, Any],
    tests: Sequence[Dialogue],
) -> dict[str, Run]:
    """The test requests in one engine: plain, the feature clamped, its control, the contrastive direction capped, and
    its controls. No gate of intent: what each does by itself."""
    clamp = {"op": "clamp", "strength": chosen["value"], "phases": ["decode"], "gate": {"by": "feature"}}
    caps = {CONTRAST: chosen["cap"]["value"], **made["random_caps"]}
    asked: dict[str, list[dict[str, Any]]] = {
        PLAIN: [],
        CLAMP: [{"vector": "feature", **clamp}],
        CONTROL: [{"vector": "control", **clamp}],
        **{n: [{"vector": n, "op": "cap", "strength": c, "phases": ["decode"]}] for n, c in caps.items()},
    }
    specs = [RunSpec(name, requests(tests, steer)) for name, steer in asked.items()]
    with EngineHost() as host:
        return record(specs, prepared(model, library, [chosen["layer"]]), folder / "arms", host=host, resume=True)


def manifest(
    folder: Path,
    model: Path,
    library: Path,
    sae_folder: Path,
    chosen: dict[str, Any],
    effect: dict[str, Any],
    runs: dict[str, Run],
) -> FeatureManifest:
    """`features.json`: the feature and the direction with their evidence from held-out objects; `validated` is what
    shows an effect there."""
    path = folder / "features.json"
    if path.exists():
        return read_features(path)
    shown = {(r["arm"], r["dose"]): max(r["kl_content"], r["kl_story"]) for r in chosen["frontier"]}

    def entered(
        name: str, controls: Sequence[str], dose: float, side_effect: float, of: dict[str, Any]
    ) -> dict[str, Any]:
        found = {
            "run": name,
            "manifest_sha256": sha256(runs[name].path / MANIFEST),
            "measure": "share of replies that are the refusal and nothing else",
            "dose": dose,
            "unit": "absolute",
            **effect[name]["held out"],
            "control": max(effect[c]["held out"]["effect"] for c in controls),
            "side_effect": side_effect,
            "of": {**of, "value": dose},
        }
        return {"label": "content follows the refusal", "labelled": by, "owner": "clamp-case", "evidence": [found]}

    by = {"by": "human", "name": "clamp-case"}
    latent = {"feature": chosen["feature"], "sae_sha256": weights_sha256(sae_folder), "mode": "clamp"}
    feature = entered(CLAMP, [CONTROL], chosen["value"], shown["feature clamped", chosen["multiple"]], latent)
    cap, listed = chosen["cap"], Library.open(library)[CONTRAST]
    vector = {"sha256": listed.hash, "mode": "cap"}
    direction = Direction.of(
        listed,
        **entered(CONTRAST, RANDOM, cap["value"], shown["contrast capped", cap["dose"]], vector),
        clamp={"mode": "cap", "value": cap["value"]},
    )
    told = {
        "model": "clamp-case",
        "model_weight_hash": weight_hash_of_folder(model),
        "hook_point": point(chosen["layer"]),
        "sae_sha256": weights_sha256(sae_folder),
        "features": [
            {
                "index": chosen["feature"],
                **feature,
                "clamp": {"mode": "clamp", "value": chosen["value"], "threshold": 0.0},
            }
        ],
        "directions": [direction.model_dump(mode="json")],
    }
    found = parse_config(told, FeatureManifest, where="features.json")
    # Each revision has a file of its own, so that what a start that was cut short left is no obstacle.
    for i, entry in enumerate([None, *found.entries]):
        if entry is not None and not entry.evidence[0].shows_an_effect:
            continue
        found = found if entry is None else found.moved(entry.key, "validated")
        place = folder / f"features.{i}.json"
        place.unlink(missing_ok=True)
        write_features(found, place)
    write_features(found, path)
    return found


def in_production(given: dict[str, Any], way: str, points: Sequence[str], tests: Sequence[Dialogue]) -> dict[str, Any]:
    """Before and after, by kind, and what it did to who is out of scope."""
    runs = {name: serve.load_run(given[f"{name} {way}"]["segment"]) for name in (serve.PLAIN, serve.CLAMPED)}
    told = {name: outcome(runs[serve.PLAIN], run, tests) for name, run in runs.items()}
    halves = {"held out": HELD_OUT, "all": SPLIT}
    effect = {half: per_object(runs[serve.PLAIN], runs[serve.CLAMPED], tests, of) for half, of in halves.items()}
    return {**told, "effect": effect, "collateral": serve.collateral(given, way, points)}


if __name__ == "__main__":
    main()
