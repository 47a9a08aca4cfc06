"""The proof: one engine of the user's configuration, random traffic, and everything that could notice a fault.

Three recordings in one engine: the traffic as the engine is configured, and again in small chunks and mixed batches,
both with the true owner of every KV slot read from the device; and the second once more with nothing that waits for it,
as in production. Then rows against `transformers`, kept sets if they are asked for, and what recording costs.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks.certified import subject_in_force
from sglang_probe.engine.hooks.instruments.kept_sets import check_reviewed
from sglang_probe.engine.platform.environment import accelerator_present, platform_facts
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.in_flight import Answer
from sglang_probe.harvest.job import job_of
from sglang_probe.harvest.kept import check_backend
from sglang_probe.harvest.kept_requests import ASKS
from sglang_probe.harvest.model import resolve_model
from sglang_probe.harvest.pool import left_open
from sglang_probe.harvest.prepare import choose_device, prepare
from sglang_probe.harvest.progress import Quiet, Reporter
from sglang_probe.harvest.recording import harvest
from sglang_probe.kept_set import KeptFile
from sglang_probe.policy.arm import Arm
from sglang_probe.prove import checks, kept_sets
from sglang_probe.prove.checks import Asked, timed
from sglang_probe.prove.clients import Clients
from sglang_probe.prove.config import ProofConfig, default_points
from sglang_probe.prove.overhead import Overhead, measure
from sglang_probe.prove.owners import read_owners
from sglang_probe.prove.traffic import Habits, make_traffic
from sglang_probe.run import certificate
from sglang_probe.run.manifest import MANIFEST, read_manifest, without_secrets
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.check import Check
from sglang_probe.verify.reference import check_against_transformers
from sglang_probe.workload.build import Workload

_POOL = 2048
"""Tokens of the KV pool on the CPU where the user left it open: few, so that entries are evicted."""
_ROOM = 64
"""Tokens of output that a request of the traffic has at most, rounded up."""
_LONGEST = 640
_CHUNK = 64
"""Tokens of a prefill chunk of the second recording, or a page if that is more."""
AS_CONFIGURED, CHUNKED, UNWATCHED = "as configured", "small chunks", "unwatched"


@dataclass
class Proof:
    """What was found."""

    asked: list[Asked] = field(default_factory=list)
    overhead: Overhead | None = None
    subject: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    """Server arguments in force that decide rows, reuse and batches."""
    versions: dict[str, Any] = field(default_factory=dict)
    hook_points: list[str] = field(default_factory=list)
    graphs: dict[str, Any] = field(default_factory=dict)
    """Sizes of graphs that were checked, and what was found (`GraphCheck.told`)."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the clients did, by recording."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether everything that was asked holds, up to the last question."""
        return bool(self.asked) and all(a.check.holds for a in self.asked) and self.overhead is not None

    def certificate(self, config: ProofConfig) -> dict[str, Any]:
        """The certificate, sealed."""
        cost = self.overhead
        return certificate.sealed(
            {
                "schema": certificate.SCHEMA,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "passed": self.passed,
                "subject": self.subject,
                "kinds": certificate.kinds_of(self.hook_points) + ([certificate.KEPT_SETS] if config.kept_sets else []),
                "hook_points": self.hook_points,
                "graphs": self.graphs,
                "server_given": without_secrets(config.server),
                "server_resolved": self.server,
                "versions": self.versions,
                "python": platform.python_version(),
                "machine": platform.machine(),
                "platform": platform_facts(),
                "seed": config.seed,
                "requests": config.requests,
                "checks": [a.to_json() for a in self.asked],
                "clients": self.counts,
                "overhead": None if cost is None else cost.to_json(),
                "seconds": round(self.seconds, 1),
            }
        )


def prove(
    config: ProofConfig, *, reporter: Reporter | None = None, folder: Path | None = None, host: EngineHost | None = None
) -> Proof:
    """Prove a configuration on this machine.

    Args:
        folder: where the recordings are left; None: a temporary one.
        host: keeps the engine; None: it ends with the proof.

    Raises:
        ProbeError: the engine cannot be started in this configuration, or the probe refuses it.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="sglang-probe-proof-") as name:
            return prove(config, reporter=reporter, folder=Path(name), host=host)
    if host is None:
        with EngineHost() as mine:
            return prove(config, reporter=reporter, folder=folder, host=mine)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    proof = Proof()
    try:
        _Proving(config, folder, host, reporter or Quiet(), proof).run()
    finally:
        proof.seconds = time.perf_counter() - began
    return proof


class _Failed(Exception):
    """A recording ended early; what is wrong is in the proof."""


class _Proving:
    """A proof under way."""

    def __init__(self, config: ProofConfig, folder: Path, host: EngineHost, reporter: Reporter, proof: Proof) -> None:
        self.config, self.folder, self.host, self.reporter, self.proof = config, folder, host, reporter, proof
        choose_device([config.server])
        server = dict(config.server)
        if not accelerator_present() and left_open(server):
            server["max_total_tokens"] = _POOL
        self.cached = not server.get("disable_radix_cache", False)
        self.server = server
        self.model = resolve_model(config.model)
        proof.hook_points = config.hook_points or default_points(self.model.layers, int(server.get("tp_size", 1)))
        first = make_traffic(self._habits(0))
        recording = Recording(
            model=config.model,
            dtype=config.dtype,
            server=server,
            hook_points=proof.hook_points,
            concurrency=self._habits(0).concurrency,
        )
        self.asks = frozenset({"cache", *(ASKS if config.kept_sets else ())})
        if config.kept_sets:
            check_reviewed(self.model.architecture)
            check_backend(server)
        self.prepared = prepare(recording, workload=Workload(tuple(t.request for t in first)), proving=True)
        self.residual = kept_sets.deepest(self.prepared.config.hook_points) if config.kept_sets else ""

    def run(self) -> None:
        """Ask everything, up to a recording that fails."""
        runs: list[Run] = []
        page = int(self.server.get("page_size") or 1)
        small = {"chunked_prefill_size": -(-_CHUNK // page) * page, "enable_mixed_chunk": True}
        # What the user left open: an engine can change both while it runs.
        small = {k: v for k, v in small.items() if k not in self.server}
        kinds: list[tuple[str, dict[str, Any]]] = [(AS_CONFIGURED, {}), (CHUNKED, small), (UNWATCHED, small)]
        try:
            for n, (name, server) in enumerate(kinds):
                runs.append(self._recorded(name, self._habits(n), server))
        except _Failed:
            return
        prefill_graphs = bool(self.proof.subject["prefill_graphs"])
        self._ask("P2", lambda: checks.reached(runs, cached=self.cached, prefill_graphs=prefill_graphs))
        with self.reporter.stage("rows against transformers"):
            self._ask("P3", lambda: self._reference(runs[0]))
        if self.config.kept_sets:
            with self.reporter.stage("kept sets"):
                self._kept_sets()
        with self.reporter.stage("recording against not recording"):
            self._overhead()

    def _habits(self, number: int) -> Habits:
        room = min(self.model.context_length, *(int(v) for v in self._limits()))
        if room < 2 * _ROOM:
            raise ConfigError(f"a request has room for {room} positions here; a proof needs {2 * _ROOM}")
        return Habits(
            self.config.seed + 100 * number,
            self.config.requests,
            vocabulary=self.model.vocabulary,
            longest=min(_LONGEST, room - _ROOM),
            waves=(10, 20),
            bypass=True,
            pauses=True,
            routing_keys=self.server.get("schedule_policy") == "routing-key",
        )

    def _limits(self) -> list[Any]:
        given = (self.server.get("context_length"), self.server.get("max_total_tokens"))
        return [v for v in given if v] or [self.model.context_length]

    def _recorded(self, name: str, habits: Habits, server: dict[str, Any]) -> Run:
        """One recording, and what is asked of it."""
        traffic = make_traffic(habits)
        requests = [t.request for t in traffic]
        path = self.folder / name.replace(" ", "-")
        truth = None if name == UNWATCHED else self.folder.resolve() / f"{path.name}-slots"
        job = job_of(self.prepared, name, requests, arm=Arm(server=server))
        # The list itself: requests that continue others are made while it is served.
        job = replace(job, requests=requests, slot_truth=truth)
        clients = Clients(habits, traffic, requests)
        began = time.perf_counter()
        try:
            with self.reporter.requests(name, len(requests)) as counter:

                async def serve(engine: Any) -> Any:
                    async for answer in clients.serve(engine):
                        counter.advance(len(answer.output_ids) if isinstance(answer, Answer) else 0)
                        yield answer

                run = harvest(job, path, self.host, asks=self.asks, serving=serve)
        except ProbeError as e:
            if not (path / MANIFEST).exists():
                raise
            told = read_manifest(path / MANIFEST)
            self._learn(told)
            fault = str(told.get("fault") or e.message)
            check = Check(f"recording, {name}", "the probe records to the end", 0, "requests", fault)
            self.proof.asked.append(Asked("P2", check, time.perf_counter() - began))
            raise _Failed from e
        self._learn(run.manifest)
        if name == AS_CONFIGURED and self.proof.subject["device"] != "cpu":
            checked = run.manifest.get("graphs_checked")
            there = {"decode": self.proof.subject["graphs"], "prefill": self.proof.subject["prefill_graphs"]}
            self.proof.asked.append(checks.graphs(checked, **there))
            self.proof.graphs = checked or {}
        self.proof.counts[name] = clients.counts
        served = clients.counts["served"]
        check = Check(f"recording, {name}", "the probe records to the end", served, "requests")
        self.proof.asked.append(Asked("P2", check, time.perf_counter() - began))
        with self.reporter.stage(f"{name}: checks"):
            self._ask("P2", lambda: checks.invariants(run, name))
            self._ask("P2", lambda: checks.all_ended(run, [t.request.rid for t in traffic], name))
            if truth is not None:
                true = read_owners(truth)
                self._ask("P2", lambda: checks.owners_right(true, name))
                self._ask("P2", lambda: checks.owners_written(run, true, name))
        return run

    def _learn(self, manifest: dict[str, Any]) -> None:
        """What the proof is of."""
        resolved = manifest.get("server_resolved") or {}
        self.proof.server, self.proof.versions = resolved, dict(manifest["versions"])
        model = self.prepared.model
        self.proof.subject = {
            **subject_in_force(resolved),
            **certificate.model_facts(Path(model.path)),
            "weights_sha256": model.identity["weights_sha256"],
            "architecture": model.architecture,
        }

    def _reference(self, run: Run) -> Check:
        return check_against_transformers(load_run(run.path), self.model.path, requests=self.config.references)

    def _kept_sets(self) -> None:
        began = time.perf_counter()
        (folder := self.folder / "kept sets").mkdir()
        prompts = [r.prompt_ids for r in self.prepared.workload.requests]
        run = kept_sets.record(self.prepared, prompts, folder, self.host, self.config.seed)
        kept = KeptFile(folder / "kept.safetensors")
        found = kept_sets.checks(run, kept, self.model.path, self.residual)
        found = [checks.invariants(run, kept_sets.NAME), *found]
        self.proof.asked += [Asked("P3", c, (time.perf_counter() - began) / len(found)) for c in found]

    def _overhead(self) -> None:
        began = time.perf_counter()
        # As the engine was configured, whatever the recordings before switched.
        job = job_of(self.prepared, "overhead", self.prepared.workload.requests, arm=Arm())
        cost = measure(self.host, job, self.folder / "overhead", rounds=self.config.rounds)
        check = Check("overhead", "measured, not judged", 4 * cost.tokens * len(cost.ratios), "tokens", None, cost.note)
        self.proof.asked.append(Asked("P4", check, time.perf_counter() - began))
        self.proof.overhead = cost

    def _ask(self, level: str, ask: Callable[[], Check]) -> None:
        self.proof.asked.append(timed(level, ask))
