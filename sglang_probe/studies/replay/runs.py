"""The stored requests, served again under what the manifest states: twice, in two orders, so that there is a floor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.ask import Ask
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.policy.arm import Arm
from sglang_probe.run.hook_points import score_points
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash
from sglang_probe.steering.config import SteerConfig
from sglang_probe.steering.features import Direction, Feature, FeatureManifest
from sglang_probe.steering.library import Library
from sglang_probe.steering.spec import Spec
from sglang_probe.studies.replay.clamped import clamped, clamps_of
from sglang_probe.studies.replay.stated import NONE, Stated, entries_of, stated
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request, SegmentSpan

AGAIN, SHUFFLED = "again", "shuffled"
"""The runs: in the order of the stored one, and in another order."""


@dataclass(frozen=True)
class Replay:
    """Everything that is known before an engine starts."""

    prepared: Prepared
    manifest: FeatureManifest
    stored: Run
    stated: Mapping[str, Stated]
    """By the stored request's id; one without asked for nothing."""
    requests: Sequence[Request]
    """The first of each is `names[0]`, and so on."""
    names: Sequence[str]
    """Stored ids of the requests."""
    entries: Mapping[str, Feature | Direction]
    """By the hash that the ledger has of each."""
    library: Library
    under: int
    """Requests that ran under interventions: a gate that stayed closed leaves a request plain."""
    differences: tuple[str, ...] = ()
    """Where what the server did is not what the manifest states, whatever was done to single requests."""
    undecided: tuple[str, ...] = ()
    """Stored ids of requests of which a server that clamps decided no gate."""


def prepare(
    manifest: FeatureManifest,
    stored: Run,
    library: Path,
    folder: Path,
    *,
    sae: Path | None = None,
    model: str | None = None,
    requests: int = 32,
) -> Replay:
    """Check that the run can be replayed under the manifest; starts no engine.

    Args:
        folder: of the replay, where the library is made of a run whose server clamped features of itself.
        sae: folder of the manifest's SAE, which such a run needs if features were clamped.
        model: where the model is now, if not where the run says.
        requests: so many at most; half of them under interventions while there are such.

    Raises:
        ConfigError: run or model have other weights than the manifest; the library is another one than the run's; the
            run holds no token ids, or of each request some are withheld; or nothing in it was intervened on.
    """
    told = stored.manifest
    manifest.check_weights(_weights_of(told), where=str(stored.path))
    opened = Library.open(library)
    clamps = clamps_of(told)
    of_server = clamped(clamps, manifest, opened, sae, folder / "library") if clamps else None
    entries = entries_of(opened, manifest, needed=of_server is None)
    served = NONE
    if of_server is not None:
        opened, served = of_server.library, of_server.served
        entries |= of_server.features
    under_any = set(stored.interventions()["rid"])
    if not under_any:
        raise ConfigError(f"nothing was intervened on in {stored.path}", fix="give a run whose requests were steered")
    # A gate that stayed closed is asked again too: whether it would is part of what is audited.
    asked_for = pd.concat([stored.gates()[["rid", "spec"]], stored.interventions()[["rid", "spec"]]])
    specs = {r.rid: Spec.from_json(json.loads(r.spec)) for r in asked_for.itertuples()}
    frame = askable(stored)
    under = frame["rid"].isin(under_any)
    chosen = frame[under].head(requests - min(requests // 2, int((~under).sum())))
    chosen = frame.loc[sorted([*chosen.index, *frame[~under].head(requests - len(chosen)).index])]
    found = {rid: stated(specs[rid], entries, opened, served) for rid in chosen["rid"] if rid in specs}
    asked = [_request(i, r, found.get(r.rid)) for i, r in enumerate(chosen.itertuples())]
    config = Recording(
        model=model or str(told["model_path"]),
        dtype=told["dtype"],
        sampling={"max_new_tokens": 1, "temperature": 0.0},
        hook_points=[p for p in stored.hook_points if p not in score_points(stored.hook_points)],
        steer=SteerConfig(library=opened.folder),
        server={k: v for k, v in (told.get("server_given") or {}).items() if k != "dtype"},
        concurrency=int(told.get("concurrency") or 16),
    )
    prepared = check(config, {"arm": _arm(told)}, workload=Workload(tuple(asked)))
    manifest.check_weights(weight_hash(prepared.model.identity["weights_sha256"]), where=f"the model {config.model}")
    differences = () if of_server is None else of_server.differences
    differences += idle(manifest, entries, specs.values())
    names = list(chosen["rid"])
    decided = set(stored.gates()["rid"])
    return Replay(
        prepared,
        manifest,
        stored,
        found,
        asked,
        names,
        entries,
        opened,
        sum(n in under_any for n in names),
        differences,
        tuple(n for n in names if clamps and n not in decided),
    )


def idle(
    manifest: FeatureManifest, entries: Mapping[str, Feature | Direction], specs: Iterable[Spec]
) -> tuple[str, ...]:
    """What a manifest has as `deployed` and a run did not ask of any request, in words.

    Args:
        entries: by the hash that the ledger has of each.
        specs: of the run's requests, those whose gate stayed closed among them.
    """
    asked = {entries[step.hash].key for spec in specs for step in spec.steps if step.hash in entries}
    deployed = [e for e in manifest.entries if e.status == "deployed" and e.action is not None]
    return tuple(f"{e.title} is `deployed`, and was asked of no request" for e in deployed if e.key not in asked)


def _weights_of(told: Mapping[str, Any]) -> str | None:
    """Hash of the weights that a run was recorded with; None: it is unknown, or they were updated meanwhile."""
    model = told.get("model") or {}
    if any(w.get("number") for w in told.get("weights") or ()):
        return None
    found: str | None = model.get("weight_hash") or weight_hash(model.get("weights_sha256"))
    return found


def askable(stored: Run) -> pd.DataFrame:
    """Requests of a run all of whose tokens are known.

    Raises:
        ConfigError: there are none.
    """
    frame = stored.requests()
    lacking = frame["prompt_ids"].isna() | frame["output_ids"].isna()
    frame = frame[~lacking & (frame["output_len"] > 0) & (frame["prompt_len"] > 0)]
    if frame.empty:
        raise ConfigError(f"{stored.path} holds no token ids of a finished request", fix="record with `privacy: ids`")
    whole = [min(*p, *o) >= 0 for p, o in zip(frame["prompt_ids"], frame["output_ids"], strict=True)]
    frame = frame[whole]
    if frame.empty:
        raise ConfigError(
            f"tokens of every request of {stored.path} were withheld: nothing can be served again",
            fix="give the run that it is a scrubbed copy of",
        )
    return frame


def run(
    replay: Replay,
    folder: Path,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    host: EngineHost | None = None,
) -> dict[str, Run]:
    """Serve the requests again, with their own tokens decoded by force. `host`: as `harvest.experiment.record`.

    Raises:
        RunDirectoryError: a run exists and `overwrite` was not asked.
        ProbeError: a recording failed.
    """
    arm = _arm(replay.stored.manifest)
    specs = [RunSpec(AGAIN, replay.requests, arm), RunSpec(SHUFFLED, replay.requests, arm, order_seed=1)]
    return record(
        specs, replay.prepared, folder, asks=("force", "steer"), overwrite=overwrite, reporter=reporter, host=host
    )


def _arm(told: Mapping[str, Any]) -> Arm:
    """How the run used the prefix cache; what was done to its requests comes from the manifest."""
    policy = told.get("policy") or {}
    return Arm.model_validate({k: v for k, v in policy.items() if k in ("cache", "dtype", "server") and v is not None})


def _request(index: int, r: Any, should: Stated | None) -> Request:
    output = tuple(int(t) for t in r.output_ids)
    params: dict[str, Any] = {"max_new_tokens": len(output), "temperature": 0.0, "ignore_eos": True}
    ask = Ask(force=output, steer=should.steer if should else None)
    prompt = tuple(int(t) for t in r.prompt_ids)
    segments = (SegmentSpan("prompt", 0, len(prompt)),)
    family = r.family if isinstance(r.family, str) else str(r.rid)  # a live server knows of no families
    return Request(index, f"replay-{index}", prompt, segments, family, ask.into(params))
