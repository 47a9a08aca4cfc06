"""A complete run as a harvest leaves it, small enough to be changed and checked hundreds of times.

The real recorder, writer, oracle and closing write it; engine and model are made up. It has chunks of a prefill, a
mixed batch, reuse, a rebind, a retraction with its own reuse, discarded steps, two parts, telemetry and a kept set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sglang_probe.engine.capture.telemetry import Measured
from sglang_probe.engine.ledger.facts import Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.harvest.in_flight import Answer
from sglang_probe.harvest.kept import keep_with_run
from sglang_probe.harvest.recording import close_run
from sglang_probe.harvest.requests_table import workload_columns
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from sglang_probe.run.journal import sha256
from sglang_probe.run.manifest import new_manifest, write_manifest
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.selection import RowsConfig, Selected
from sglang_probe.run.telemetry_options import NUMBERS, TelemetryConfig
from sglang_probe.run.workload_digest import digest_of_columns
from sglang_probe.studies.coverage.card import write_card
from sglang_probe.workload.build import digest_of
from sglang_probe.workload.request import LabelSpan, Request, SegmentSpan

WIDTH, VOCABULARY, LAYERS, HEADS, TOP = 8, 60, 2, 2, 3
RESID, VALUE = "blocks.1.hook_resid_post", "blocks.0.attn.hook_v"
POINTS = ("hook_embed", RESID, VALUE)
ROWS = RowsConfig.model_validate({"at": {VALUE: {"window": 2, "decode": {"every": 2}}}})
SHARED = [1, 5, 6, 7, 8, 9, 10, 11]


@dataclass
class _Made:
    """One request of the made-up engine."""

    rid: str
    prompt: list[int]
    output: list[int]
    cached: int = 0
    attempt: int = 0
    done: int = 0
    """Positions that have an entry."""
    sampling: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 8, "temperature": 0.0})

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output


def make_good_run(folder: Path, seed: int = 0) -> Run:
    """Write the run `folder/run` and its model `folder/model`; other seeds give other tokens, rows and weights."""
    torch.manual_seed(seed)
    embedding = torch.randn((VOCABULARY, WIDTH)).to(torch.bfloat16)
    model, path = folder / "model", folder / "run"
    model.mkdir(parents=True)
    path.mkdir()
    save_file({"model.embed_tokens.weight": embedding}, model / "model.safetensors")
    shift = seed % 3
    made = [
        _Made("r000000", [*SHARED, 20 + shift, 21, 22, 23], [30, 31, 32, 33]),
        _Made("r000001", [*SHARED, 24, 25], [34, 35, 36, 55]),
        _Made("r000002", [*SHARED, 26, 27 + shift], [37, 38, 39], cached=8),
        _Made("r000003", [2, 40 + shift, 41, 42, 43, 44], [45, 46, 47, 48, 49, 57]),
        _Made("r000004", [*SHARED, 50, 51], [52, 53, 54], cached=8),
    ]
    requests = [_request(i, m) for i, m in enumerate(made)]
    engine = _Engine(path, embedding, {m.rid: m for m in made})
    _serve(engine)
    engine.stop()
    every_other = torch.arange(seed, seed + 8).remainder(2).eq(0)
    write_kept(folder / "kept.safetensors", {"half": Kept(every_other.expand(1, LAYERS, 1, 8))})
    kept = KeptFile(folder / "kept.safetensors")
    manifest = _manifest(path, model, requests, kept)
    manifest["kept"] = keep_with_run(path, kept, requests)
    (path / "probe.yaml").write_text("{}\n")
    write_manifest(path, {**manifest, "status": "incomplete"})
    job: Any = SimpleNamespace(
        requests=requests, kept=kept, prepared=SimpleNamespace(model=SimpleNamespace(path=str(model)))
    )
    close_run(job, path, {"fault": None, **manifest}, [Answer(m.rid, m.output, m.cached) for m in made], {})
    run = load_run(path)
    write_card(run)
    return run


def _request(index: int, made: _Made) -> Request:
    cut = len(SHARED) if made.prompt[: len(SHARED)] == SHARED else 2
    spans = (SegmentSpan("system", 0, cut), SegmentSpan("user", cut, len(made.prompt)))
    sampling = {**made.sampling, **({"custom_params": {"probe": {"evict": "half"}}} if index == 4 else {})}
    labels = (LabelSpan("topic", "first", 0, 1),) if index == 1 else ()
    return Request(index, made.rid, tuple(made.prompt), spans, f"f{index // 3}", sampling, labels)


def _serve(engine: _Engine) -> None:
    engine.prefill("extend", ("r000000", 0, 6))  # the first chunk
    engine.prefill("extend", ("r000000", 6, 12), ("r000001", 0, 10))  # both compute the shared prefix
    engine.publish("r000000", 12, protected=0, first_new=0)
    engine.publish("r000001", 10, protected=0, first_new=8)  # and the second is rebound to the first
    engine.prefill("mixed", ("r000002", 8, 10), decoding=("r000000", "r000001"))
    engine.publish("r000002", 10, protected=8, first_new=8)
    engine.decode("r000000", "r000001", "r000002")
    engine.flush()
    engine.prefill("extend", ("r000003", 0, 6))
    engine.publish("r000003", 6, protected=0, first_new=0)
    engine.decode("r000000", "r000003", "r000001", "r000002", ends=("r000000",))
    engine.decode("r000003", "r000001", "r000002", ends=("r000001", "r000002"), discarded=("r000001", "r000002"))
    engine.retract("r000003")
    engine.prefill("extend", ("r000004", 8, 10))
    engine.prefill("extend", ("r000003", 6, 9))
    engine.decode("r000003", "r000004")
    engine.decode("r000003", "r000004", ends=("r000004", "r000003"))
    engine.flush()


class _Engine:
    def __init__(self, path: Path, embedding: torch.Tensor, made: dict[str, _Made]) -> None:
        self._writer = Writer(path)
        self._recorder = Recorder(self._writer, lineage=Lineage(1, 1000), captures_rows=True)
        self._embedding, self._made, self._tag = embedding, made, 0
        self._selected = Selected(ROWS, POINTS)

    def prefill(self, mode: str, *asked: tuple[str, int, int], decoding: tuple[str, ...] = ()) -> None:
        self._forward(mode, [*asked, *self._next(decoding)], len(asked))

    def decode(self, *rids: str, ends: tuple[str, ...] = (), discarded: tuple[str, ...] = ()) -> None:
        self._forward("decode", self._next(rids), 0, ends, discarded)

    def publish(self, rid: str, length: int, *, protected: int, first_new: int) -> None:
        m = self._made[rid]
        self._recorder.publish(rid, m.attempt, Context(np.array(m.ids), None), length, first_new, protected)

    def retract(self, rid: str) -> None:
        self._made[rid].attempt += 1

    def flush(self) -> None:
        self._writer.flush(timeout=30)

    def stop(self) -> None:
        self._writer.stop()
        self._writer._thread.join(10)  # the lock is gone with it

    def _next(self, rids: tuple[str, ...]) -> list[tuple[str, int, int]]:
        return [(r, self._made[r].done, self._made[r].done + 1) for r in rids]

    def _forward(
        self,
        mode: str,
        asked: list[tuple[str, int, int]],
        prefills: int,
        ends: tuple[str, ...] = (),
        discarded: tuple[str, ...] = (),
    ) -> None:
        self._tag += 1
        made = [self._made[r] for r, _, _ in asked]
        starts, stops = [s for _, s, _ in asked], [e for _, _, e in asked]
        decoding = [i >= prefills for i in range(len(asked))]
        plan = ForwardPlan(
            self._tag,
            mode,
            [m.rid for m in made],
            starts,
            stops,
            decoding,
            [m.attempt for m in made],
            [len(m.prompt) for m in made],
            [None if d else Context(np.array(m.ids), None) for m, d in zip(made, decoding, strict=True)],
            sum(stops) - sum(starts),
            waiting=len(asked) % 2,
        )
        for rid in discarded:  # they ended with the forward before, while this one was in flight
            if plan.forward_id < 0:
                self._recorder.launch(plan)
            self._recorder.abort(self._end(rid))
        if plan.forward_id < 0:
            self._recorder.launch(plan)
        ids = [(m.prompt + m.output)[:e] for m, e in zip(made, stops, strict=True)]
        prefixes = [tuple(x[: p + 1]) for x, s, e in zip(ids, starts, stops, strict=True) for p in range(s, e)]
        tokens = [x[-1] for x in prefixes]
        plan.selected = self._selected.offsets(plan.starts, plan.ends, plan.prompt_lens)
        captured = {"hook_embed": self._embedding[tokens], RESID: _rows(prefixes, 1), VALUE: _rows(tokens, 2)}
        plan.rows = {
            h: x[plan.selected[h]] if h in plan.selected else x
            for h, x in captured.items()
            if h not in plan.selected or len(plan.selected[h])
        }
        steps = [(m, s) for m, s, d in zip(made, starts, decoding, strict=True) if d and (s - len(m.prompt)) % 2 == 0]
        plan.telemetry = _measured(plan.forward_id, steps) if steps else None
        for m, e in zip(made, stops, strict=True):
            m.done = max(m.done, e) if m.rid not in discarded else m.done
        self._recorder.commit(
            self._tag, graph=mode == "decode", ended=[self._end(r) for r in ends if r not in discarded]
        )

    def _end(self, rid: str) -> RequestEnd:
        m = self._made[rid]
        return RequestEnd(rid, len(m.prompt), len(m.output), m.cached, m.attempt, "length", m.output)


def _rows(keys: list[Any], salt: int) -> torch.Tensor:
    """Rows that depend on their keys alone, `[n, WIDTH]`."""
    rows = [np.random.default_rng([salt, *np.atleast_1d(k)]).standard_normal(WIDTH) for k in keys]
    return torch.from_numpy(np.stack(rows)).to(torch.bfloat16)


def _measured(forward: int, steps: list[tuple[_Made, int]]) -> Measured:
    shape = (LAYERS, len(steps), HEADS)
    numbers = {n: np.full(shape, 0.2 if "mass" in n else 0.5, np.float32) for n in NUMBERS}
    positions = np.array([s for _, s in steps])
    top = np.tile(positions[None, :, None, None], (LAYERS, 1, HEADS, TOP)).astype(np.int32)
    attempts = np.array([m.attempt for m, _ in steps])
    weights = np.full((*shape, TOP), 0.3, np.float32)
    return Measured(list(range(LAYERS)), numbers, top, weights, [m.rid for m, _ in steps], attempts, positions, forward)


def _manifest(path: Path, model: Path, requests: list[Request], kept: KeptFile) -> dict[str, Any]:
    return new_manifest(
        name=path.name,
        arm="arm",
        policy={"cache": "on", "partners": None, "dtype": None, "server": {}},
        model={
            "name": "made-up",
            "architecture": "LlamaForCausalLM",
            "layers": LAYERS,
            "context_length": 64,
            "weights_sha256": {"model.safetensors": sha256(model / "model.safetensors")},
            "tokenizer_sha256": None,
        },
        model_path=str(model),
        model_config={"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "dtype": "bfloat16"},
        dtype="auto",
        hook_points=dict.fromkeys(POINTS, "module"),
        rows_kept=ROWS.model_dump(mode="json"),
        telemetry=TelemetryConfig(every=2, top_k=TOP).model_dump(mode="json"),
        telemetry_layers=list(range(LAYERS)),
        heads={VALUE: [2, 4]},
        head_numbers={},
        workload={"source": "jsonl"},
        workload_digest=digest_of(requests),
        columns_digest=digest_of_columns(workload_columns(r) for r in requests),
        corpus_digest=None,
        sampling={"max_new_tokens": 8},
        concurrency=4,
        submission_order=None,
        server_given={"dtype": "auto"},
        switches={"radix_cache": True},
        weights=[{"number": 0, "how": "model_path"}],
        partners=None,
        forced_from=None,
        forced_digest=None,
        kept_digest=kept.digest(kept),
        inventory={"sglang": "0.5.23", "version": 1},
        requests_expected=len(requests),
        lines_skipped=0,
        privacy="ids",
        server_resolved={"page_size": 1},
        starts=[{"seconds": 1.0, "requests": len(requests)}],
    )
