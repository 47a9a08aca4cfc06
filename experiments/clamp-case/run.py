"""The worked case: a planted behaviour, found by an SAE, shown to be caused by a feature, clamped where a gate opens.

    python experiments/clamp-case/run.py [--folder runs/clamp-case] [--report-only]

Stages that are done are kept: train the model, capture (engine), train an SAE (SAELens, the extra `[sae]`), find the
feature by differential activation, probe for the gate, clamp with and without the gate (engine), manifest, report.
Writes `summary.json` and `report.html` into the folder, and copies the summary beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from dialogues import HEADER, IDS, KINDS, MOST_NEW, NAMES, Dialogue, dialogue, is_incident, words_of
from model import TRAINING_NAMES, train

from sglang_probe.config import parse_config
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.report.figures import grouped_bars
from sglang_probe.report.page import Page, Section, Tile, write
from sglang_probe.report.tables import Table
from sglang_probe.run.journal import sha256
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.sae.differential import difference, permutation_p
from sglang_probe.sae.features import FeatureManifest, write_features
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.stats.multiple import benjamini_hochberg
from sglang_probe.steer_ask import Steer
from sglang_probe.steering import probe
from sglang_probe.steering.apply import Bank, intervene, parts_of
from sglang_probe.steering.library import weight_hash_of_folder
from sglang_probe.steering.make import Target, sae_feature
from sglang_probe.steering.plan import rows_of
from sglang_probe.steering.resolve import spec_of
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request, SegmentSpan

HERE = Path(__file__).parent
POINT, FPR, Q = "blocks.1.hook_resid_post", 0.021, 0.05
CAPTURED = {"content": 240, "story": 160, "refused": 120, "split": 120}
TESTED = {"content": 96, "story": 72, "refused": 72, "split": 72}
CLAMP = {"op": "clamp", "strength": 0.0, "phases": ["decode"], "gate": {"by": "feature"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/clamp-case"))
    parser.add_argument("--report-only", action="store_true", help="read what is there, and draw the report again")
    args = parser.parse_args()
    folder = args.folder
    if not args.report_only:
        folder.mkdir(parents=True, exist_ok=True)
        summary = case(folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        shutil.copyfile(folder / "summary.json", HERE / "summary.json")
    summary = json.loads((folder / "summary.json").read_text())
    write(report(summary), folder / "report.html")
    sys.stdout.write(json.dumps(summary["arms"], indent=1) + "\n")


def case(folder: Path) -> dict[str, Any]:
    """All stages; what they found."""
    model, library = folder / "model", folder / "library"
    if not (folder / "model.json").exists():
        (folder / "model.json").write_text(json.dumps(train(model)))
    captured = capture(folder, model)
    sae_folder = sae(folder)
    found = discover(captured, sae_folder)
    index, control = found["feature"], found["control"]
    if not (library / "scope.json").exists():
        shutil.rmtree(library, ignore_errors=True)
        for name, i in (("feature", index), ("control", control)):
            sae_feature(Target(library, name), sae_folder, i, captured["scope"], trust=True)
        gate = probe.write(Target(library, "scope"), captured["scope"], captured["other"], POINT, fpr=FPR)
        found["gate"] = dict(gate.card.evidence)
        (folder / "found.json").write_text(json.dumps(found))
    found = json.loads((folder / "found.json").read_text())
    tests = dialogues(TESTED, "test", NAMES)
    runs = arms(folder, model, library, tests)
    table = {name: outcome(runs["plain"], run, tests) for name, run in runs.items()}
    effect = {name: per_object(runs["plain"], runs[name], tests) for name in ("clamp", "control")}
    side = side_effect(model, library, "feature", tests)
    features = manifest(folder, model, sae_folder, found, effect, runs["clamp"], side)
    found.pop("gate", {}).pop("roc", None)
    return {
        "model": json.loads((folder / "model.json").read_text()),
        "found": found,
        "arms": table,
        "effect": effect,
        "side_effect_kl_nats_per_token": side,
        "collateral": collateral(runs["plain"], runs["gated"], tests),
        "manifest": {"sha256": features.sha256, "status": features.feature(index).status},
        "replay": "not run by this script: `sglang-probe replay` audits a recorded run against its manifest",
    }


def dialogues(counts: dict[str, int], seed: str, names: list[str]) -> list[Dialogue]:
    """The requests, in an order that mixes kinds."""
    rng = random.Random(seed)
    drawn = [dialogue(kind, rng, names) for kind in KINDS for _ in range(counts[kind])]
    rng.shuffle(drawn)
    return drawn


def requests(drawn: Sequence[Dialogue], steer: Sequence[dict[str, Any]] = ()) -> list[Request]:
    """As the engine receives them. A family is an object: texts about it are alike."""
    params: dict[str, Any] = {"max_new_tokens": MOST_NEW, "temperature": 0.0}
    if steer:
        params["custom_params"] = {"probe": {"steer": list(steer)}}
    made = []
    for i, d in enumerate(drawn):
        ids = tuple(IDS[w] for w in d.prompt)
        made.append(Request(i, f"r{i}", ids, (SegmentSpan("prompt", 0, len(ids)),), f"{d.kind} {d.object}", params))
    return made


def prepared(model: Path, library: Path | None) -> Prepared:
    config = {
        "model": str(model.resolve()),
        "dtype": "float32",
        "hook_points": ["hook_embed", POINT],
        "concurrency": 16,
        "server": {"max_total_tokens": 8192},
        "steer": None if library is None else {"library": str(library.resolve())},
    }
    return prepare(
        Recording.model_validate(config), workload=Workload(tuple(requests(dialogues(TESTED, "any", NAMES))))
    )


def capture(folder: Path, model: Path) -> dict[str, Run]:
    """Replies of the model to requests in scope (about forbidden objects) and others, with their rows."""
    drawn = dialogues(CAPTURED, "capture", TRAINING_NAMES)
    inside = [d for d in drawn if d.kind in ("refused", "split")]
    outside = [d for d in drawn if d.kind not in ("refused", "split")]
    specs = [RunSpec("scope", requests(inside)), RunSpec("other", requests(outside))]
    return record(specs, prepared(model, None), folder / "captured", resume=True)


def sae(folder: Path) -> Path:
    """A dictionary of the captured rows."""
    made = folder / "sae"
    if not (made / "summary.json").exists():
        config = {
            "runs": [str((folder / "captured" / name).resolve()) for name in ("scope", "other")],
            "hook_point": POINT,
            "k": 8,
            "latents": [512],
            "samples": 250_000,
            "batch_size": 512,
        }
        (folder / "sae.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "sglang_probe", "sae", "train", str(folder / "sae.yaml")]
        subprocess.run([*command, "--output", str(made), "--resume"], check=True)
    return next(p.parent for p in sorted(made.glob("*/cfg.json")))


def discover(captured: dict[str, Run], sae_folder: Path) -> dict[str, Any]:
    """The latent that tells split replies from other refusals on the rows of the header; and as a control one that is
    as active there and tells nothing."""
    opened = read_sae(sae_folder, hook_point=POINT)
    run = captured["scope"]
    tokens = run.tokens()
    tokens = tokens[(tokens["phase"] == "decode") & (tokens["source_row"] >= 0)]
    families = run.requests().set_index("rid")["family"]
    values, group, objects = [], [], []
    for rid, rows in tokens.groupby("rid"):
        rows = rows.sort_values("position").head(len(HEADER))
        z = opened.encode(run.rows(POINT, rows["source_row"].to_numpy()).float())
        values.append(z.mean(0).numpy())
        group.append(int(str(families[rid]).startswith("split")))
        objects.append(str(families[rid]))
    x, g = np.array(values, dtype=np.float64), np.array(group)
    names = sorted(set(objects))
    random.Random(0).shuffle(names)
    first = np.isin(objects, names[::2])
    alive = (x > 0).mean(0) > 0.02
    at = np.flatnonzero(alive)
    halves = [permutation_p(x[half][:, at], g[half], seed=1) for half in (first, ~first)]
    q = [benjamini_hochberg(p) for p in halves]
    gap = difference(x[first][:, at], g[first])
    up = np.where(q[0] <= Q, gap, -np.inf)
    best = int(up.argmax())
    mean = x[:, at].mean(0)
    still = np.flatnonzero((halves[0] > 0.5) & (mean > 0))
    other = int(still[np.abs(np.log(mean[still] / mean[best])).argmin()])
    return {
        "feature": int(at[best]),
        "control": int(at[other]),
        "texts": len(x),
        "alive": len(at),
        "difference": float(gap[best]),
        "q_discovery": float(q[0][best]),
        "q_confirmation": float(q[1][best]),
        "difference_confirmation": float(difference(x[~first][:, at], g[~first])[best]),
        "discoveries": int((q[0] <= Q).sum()),
        "mean_activation": {"feature": float(mean[best]), "control": float(mean[other])},
    }


def arms(folder: Path, model: Path, library: Path, tests: Sequence[Dialogue]) -> dict[str, Run]:
    """The test requests in one engine: plain, clamped, clamped where the gate opens, and the control clamped."""
    gate = {"by": "probe", "probe": "scope"}
    asked: dict[str, list[dict[str, Any]]] = {
        "plain": [],
        "clamp": [{"vector": "feature", **CLAMP}],
        "gated": [{"vector": "feature", **CLAMP, "gate": gate}],
        "control": [{"vector": "control", **CLAMP}],
    }
    specs = [RunSpec(name, requests(tests, steer)) for name, steer in asked.items()]
    with EngineHost() as host:
        return record(specs, prepared(model, library), folder / "arms", host=host, resume=True)


def replies(run: Run) -> list[list[str]]:
    frame = run.requests().sort_values("index")
    return [words_of([int(i) for i in ids]) for ids in frame["output_ids"]]


def outcome(plain: Run, run: Run, tests: Sequence[Dialogue]) -> dict[str, Any]:
    """By kind: requests, incidents, and replies that differ from the plain ones."""
    before, after = replies(plain), replies(run)
    told = {}
    for kind in KINDS:
        at = [i for i, d in enumerate(tests) if d.kind == kind]
        told[kind] = {
            "requests": len(at),
            "incidents": sum(is_incident(after[i]) for i in at),
            "changed": sum(after[i] != before[i] for i in at),
        }
    gates = run.gates()
    if len(gates):
        opened = dict(zip(gates["rid"], gates["opened"], strict=True))
        for kind in KINDS:
            told[kind]["gate_opened"] = sum(bool(opened[f"r{i}"]) for i, d in enumerate(tests) if d.kind == kind)
    return told


def per_object(plain: Run, run: Run, tests: Sequence[Dialogue]) -> dict[str, float]:
    """Mean over split objects of the change of the share of incidents, with its 95 % interval."""
    before, after = replies(plain), replies(run)
    changes = []
    for thing in sorted({d.object for d in tests if d.kind == "split"}):
        at = [i for i, d in enumerate(tests) if d.kind == "split" and d.object == thing]
        changes.append(np.mean([is_incident(after[i]) - is_incident(before[i]) for i in at]))
    found = mean_intervals(np.array(changes)[:, None])
    effect, low, high = (float(x[0]) for x in (found.estimate, found.low, found.high))
    if len({*changes}) == 1:  # no spread to take an interval of: so many others may have been missed (97.5 %)
        missed = 1 - 0.025 ** (1 / len(changes))
        low, high = max(-1.0, effect - missed), min(1.0, effect + missed)
    return {"effect": effect, "low": low, "high": high, "n": len(changes)}


def collateral(plain: Run, gated: Run, tests: Sequence[Dialogue]) -> dict[str, int]:
    """Of requests that the gate left out of scope: outputs and rows that are not the same bits."""
    gates = gated.gates()
    closed = [rid for rid, opened in zip(gates["rid"], gates["opened"], strict=True) if not opened]
    outputs = [run.requests().set_index("rid")["output_ids"] for run in (plain, gated)]
    different = rows = 0
    for rid in closed:
        x, y = (run.activations(rid, POINT) for run in (plain, gated))
        rows += len(x)
        different += x.shape != y.shape or not torch.equal(x, y) or list(outputs[0][rid]) != list(outputs[1][rid])
    out_of_scope = sum(d.kind in ("content", "story") for d in tests)
    wrongly = sum(tests[int(r[1:])].kind in ("content", "story") for r in gates.loc[gates["opened"], "rid"])
    return {
        "requests_left_out": len(closed),
        "rows_compared": rows,
        "requests_with_any_difference": different,
        "out_of_scope": out_of_scope,
        "out_of_scope_that_passed_the_gate": wrongly,
    }


def side_effect(model: Path, library: Path, name: str, tests: Sequence[Dialogue]) -> float:
    """KL of the clamped model from the plain one on replies out of scope, nats a token, in `transformers`."""
    from transformers import AutoModelForCausalLM

    from sglang_probe.steering.library import Library

    opened = Library.open(library)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    vector = opened[name]
    bank, numbers = Bank.of([parts_of(vector.tensors)]), {vector.hash: 1}
    spec = spec_of([Steer.model_validate({"vector": name, **CLAMP})], opened, where="steer")
    plan: dict[int, Any] = {}

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        changed = intervene(x[0], plan.get(1, []), bank)[None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    net.model.layers[1].register_forward_hook(hook)
    total, count = 0.0, 0
    for d in tests:
        if d.kind != "content":
            continue
        ids = torch.tensor([[IDS[w] for w in (*d.prompt, *d.reply)]])
        with torch.no_grad():
            plan.clear()
            p = net(ids, use_cache=False).logits[0].log_softmax(-1)
            plan.update(rows_of([0], [ids.shape[1]], [len(d.prompt)], [spec], numbers))
            q = net(ids, use_cache=False).logits[0].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[len(d.prompt) :]
        total, count = total + float(kl.sum()), count + len(kl)
    return max(total / count, 0.0)


def manifest(
    folder: Path,
    model: Path,
    sae_folder: Path,
    found: dict[str, Any],
    effect: dict[str, Any],
    run: Run,
    side: float,
) -> FeatureManifest:
    """`features.json`: the feature with its evidence; `validated` if that shows an effect."""
    evidence = {
        "run": "clamp",
        "manifest_sha256": sha256(run.path / MANIFEST),
        "measure": "share of replies with content after a refusal",
        "dose": 0.0,
        "unit": "absolute",
        **{k: effect["clamp"][k] for k in ("effect", "low", "high", "n")},
        "control": effect["control"]["effect"],
        "side_effect": side,
    }
    told = {
        "model": "clamp-case",
        "model_weight_hash": weight_hash_of_folder(model),
        "hook_point": POINT,
        "sae_sha256": weights_sha256(sae_folder),
        "features": [
            {
                "index": found["feature"],
                "label": "content follows the refusal",
                "labelled": {"by": "human", "name": "clamp-case"},
                "owner": "clamp-case",
                "evidence": [evidence],
                "clamp": {"mode": "clamp", "value": 0.0, "threshold": 0.0},
            }
        ],
    }
    first = parse_config(told, FeatureManifest, where="features.json")
    path = folder / "features.json"
    path.unlink(missing_ok=True)
    write_features(first, path)
    if not first.feature(found["feature"]).evidence[0].shows_an_effect:
        return first
    moved = first.moved(found["feature"], "validated")
    write_features(moved, path)
    return moved


def report(summary: dict[str, Any]) -> Page:
    """What was found, on one page."""
    import pandas as pd

    arms = pd.DataFrame(
        [{"arm": arm, "kind": kind, **told} for arm, kinds in summary["arms"].items() for kind, told in kinds.items()]
    )
    split = arms[arms["kind"] == "split"]
    before, after = (int(split.loc[split["arm"] == a, "incidents"].iloc[0]) for a in ("plain", "gated"))
    c = summary["collateral"]
    return Page(
        title="A clamp on split-personality replies",
        answer=f"{before} incidents before, {after} clamped where the gate opens; of {c['requests_left_out']} "
        f"requests that the gate left out, {c['requests_with_any_difference']} differ in any bit.",
        picture=grouped_bars(arms, "kind", "arm", "incidents", title="Replies with content after a refusal"),
        tiles=[
            Tile("feature", str(summary["found"]["feature"]), f"status {summary['manifest']['status']}"),
            Tile("effect", f"{summary['effect']['clamp']['effect']:.2f}", "share of incidents, mean over objects"),
            Tile("control", f"{summary['effect']['control']['effect']:.2f}", "another feature at the same place"),
        ],
        sections=[Section("Arms", tables=[Table(arms, "arms", file="arms")])],
    )


if __name__ == "__main__":
    main()
