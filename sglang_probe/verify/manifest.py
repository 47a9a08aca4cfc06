"""The manifest against the data: what it counts and names is what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.run import schema, seal
from sglang_probe.run.hook_points import EMBED, parse_hook_point, score_points
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check
from sglang_probe.verify.ownership import ORACLE_FILE, oracle_weights

_OF_A_SEGMENT = (
    *("created", "versions", "python", "machine", "name", "hook_points", "status", "fault", "requests_expected"),
    *("requests_by_finish", "positions_by_status", "positions_by_phase", "rows", "facts", "files"),
)
_OF_A_SERVER = (
    *("arm", "model", "model_path", "dtype", "rows_kept", "telemetry", "telemetry_layers", "heads", "head_numbers"),
    *("inventory", "privacy", "server_resolved", "weights", "rows_dropped"),
)
_OF_A_HARVEST = (
    *("policy", "model_config", "workload", "workload_digest", "columns_digest", "corpus_digest", "sampling"),
    *("concurrency", "submission_order", "server_given", "switches", "partners", "forced_from", "forced_digest"),
    *("kept_digest", "lines_skipped", "starts", "rows_dtype", "cached_tokens_disagreements"),
)
_SINCE_SCHEMA_6 = ("positions_intervened",)
"""Of a harvest."""
_WITHIN = {
    "versions": ("sglang-probe", "sglang", "torch", "transformers"),
    "model": ("name", "architecture", "layers", "context_length", "weights_sha256", "tokenizer_sha256"),
    "policy": ("cache", "partners", "dtype", "server"),
    "inventory": ("sglang", "version"),
    "kept": ("file", "sha256", "sets", "frees_memory"),
    "facts": ("spans", "forwards", "rebinds", "requests", "rebound_positions"),
    "telemetry": ("sinks", "window", "top_k", "memory", "every", "layers"),
    "rows_kept": ("prefill", "window", "decode", "heads", "kv_heads", "at"),
}
_STATUSES = ("complete", "incomplete", "recording", "interrupted")


_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""What SGLang's `--dtype` takes."""


def manifest_fits(run: Run) -> Check:
    """Every field of the manifest that says something of the data says what is there."""
    name, claim = "manifest", "the manifest names and counts what the run directory holds"
    found = next(chain(_named(run), _counted(run), _policy(run)), None)
    return Check(name, claim, len(run.manifest), "fields", found)


def _named(run: Run) -> Iterator[str]:
    m = run.manifest
    here = segment.of(run)
    if m["schema_version"] >= seal.SINCE_SCHEMA and seal.closed(m):
        due = [*_OF_A_SEGMENT]
        due += _OF_A_SERVER if here is None or m.get("kind") == "live" else ()
        due += _OF_A_HARVEST if here is None else ()
        due += _SINCE_SCHEMA_6 if here is None and m["schema_version"] >= 6 else ()
        yield from (f"the manifest has no `{key}`" for key in due if key not in m)
        if here is None:
            yield from _whole(m)
    if m["schema_version"] < seal.SINCE_SCHEMA and (run.path / seal.NAME).exists():
        yield f"the run has a seal, and schema version {m['schema_version']} has none"
    if m["schema_version"] < 6:
        yield from (f"schema version {m['schema_version']} has no `{key}`" for key in _SINCE_SCHEMA_6 if key in m)
    if m["schema_version"] < 1:
        yield f"schema version {m['schema_version']} does not exist"
    if m["status"] not in _STATUSES:
        yield f"status `{m['status']}` is none of {', '.join(_STATUSES)}"
    if m["status"] == "complete" and m.get("fault"):
        yield f"the run is complete, and has a fault: {m['fault']}"
    recorded = run.recorded_files()
    if (files := m.get("files")) is not None and files != recorded:
        other = sorted(f for f in files.keys() | recorded.keys() if files.get(f) != recorded.get(f))
        yield f"`files` is not what the journal has: {other[0]}"
    yield from _hook_points(run, recorded)
    stored = any(f.startswith("telemetry/") for f in recorded)
    if stored and not m.get("telemetry"):
        yield "there is telemetry, and the manifest says that none was recorded"
    versions, inventory = m.get("versions") or {}, m.get("inventory") or {}
    if versions.get("sglang") and inventory.get("sglang") and versions["sglang"] != inventory["sglang"]:
        yield f"SGLang {versions['sglang']} was recorded with the hooks of {inventory['sglang']}"
    weights = (m.get("model") or {}).get("weights_sha256")
    if (run.path / ORACLE_FILE).exists() and (of := oracle_weights(run)) is not None and of != weights:
        yield "the model's weights are not those that the embedding oracle was made from"


def _whole(m: dict[str, Any]) -> Iterator[str]:
    """Fields within fields, and fields that say the same thing."""
    for field, keys in _WITHIN.items():
        if isinstance(m.get(field), dict):
            yield from (f"`{field}` has no `{key}`" for key in keys if key not in m[field])
    if m["model"]["layers"] != (layers := m["model_config"].get("num_hidden_layers", m["model"]["layers"])):
        yield f"`model` has {m['model']['layers']} layers, and `model_config` {layers}"
    if m["model"]["weights_sha256"] is not None and not isinstance(m["model"]["weights_sha256"], dict):
        yield "`weights_sha256` of the model is no mapping"
    if (m["forced_from"] is None) != (m["forced_digest"] is None):
        yield f"outputs were forced from {m['forced_from']}, and their digest is {m['forced_digest']}"
    if (m["kept_digest"] is None) != (m.get("kept") is None):
        yield "there are kept sets without their digest, or a digest without kept sets"
    policy = m["policy"] or {}
    if policy.get("partners") != m["partners"]:
        yield "`partners` are not those of the policy"
    if policy.get("dtype") is not None and policy["dtype"] != m["dtype"]:
        yield f"the policy asks for {policy['dtype']}, and the model ran in {m['dtype']}"
    if m["dtype"] not in _DTYPES:
        yield f"`dtype` is {m['dtype']}, which SGLang does not know"
    if not re.fullmatch(r"[0-9a-f]{64}", str(m["workload_digest"])):
        yield f"`workload_digest` is {m['workload_digest']}, and no SHA-256"
    if not isinstance(m["concurrency"], int) or m["concurrency"] < 1:
        yield f"`concurrency` is {m['concurrency']}"
    for key in ("lines_skipped", "rows_dropped"):
        if not isinstance(m[key], int) or m[key] < 0:
            yield f"`{key}` is {m[key]}"
    if m["rows_dropped"]:
        yield f"`rows_dropped` is {m['rows_dropped']}: a harvest drops none"
    if set(m["heads"]) != (per_head := {h for h in m["hook_points"] if parse_hook_point(h).in_attention}):
        yield f"`heads` names {sorted(m['heads'])}, and {sorted(per_head)} have rows per head"
    if not set(m["head_numbers"]) <= set(m["heads"]):
        yield "`head_numbers` names a hook point that `heads` does not"


def _hook_points(run: Run, recorded: dict[str, str]) -> Iterator[str]:
    m = run.manifest
    folders = {f.split("/")[1] for f in recorded if f.startswith("rows/")}
    if lost := folders - set(run.hook_points):
        yield f"there are rows of {min(lost)}, and `hook_points` does not name it"
    config = m.get("model_config") or {}
    layers = (m.get("model") or {}).get("layers") or config.get("num_hidden_layers")
    for h in run.hook_points:
        try:
            point = parse_hook_point(h)
        except ConfigError as e:
            yield f"`hook_points`: {e.message}"
            continue
        if point.layer is not None and layers is not None and point.layer >= layers:
            yield f"`hook_points` names {h}, and the model has {layers} layers"
        if run.row_count() and h not in folders and h not in run.selected.partial:
            yield f"{run.row_count()} rows were numbered, and none of {h} is there"
    if EMBED in folders and EMBED not in run.hook_points:
        yield f"`hook_points` does not name {EMBED}, by which rows are proved to be their tokens'"
    dtype = m.get("rows_dtype")
    rows = folders - set(score_points(run.hook_points))  # scores are fp32 in any case
    if (dtype is None) != (not rows) and "rows_dtype" in m:
        yield f"`rows_dtype` is {dtype}, and there are {'no ' if not rows else ''}rows"
    if set(m.get("scores") or {}) != set(score_points(run.hook_points)):
        yield f"`scores` names {sorted(m.get('scores') or {})}, and `hook_points` {score_points(run.hook_points)}"
    asked = (m.get("server_given") or {}).get("dtype", m.get("dtype"))
    of_weights = config.get("dtype") or config.get("torch_dtype")
    if asked == "auto" and of_weights in ("bfloat16", "float16"):  # of float32 weights SGLang makes another dtype
        asked = of_weights
    if dtype is not None and asked in ("bfloat16", "float16", "float32") and asked != dtype:
        yield f"the model ran in {asked}, and rows are {dtype}"


def _counted(run: Run) -> Iterator[str]:
    m = run.manifest
    spans = run.spans()
    lengths = spans["end"] - spans["start"]
    for key, column in (("positions_by_status", "status"), ("positions_by_phase", "phase")):
        found = {k: int(v) for k, v in lengths.groupby(spans[column]).sum().items()}
        if key in m and m[key] != found:
            yield f"`{key}` is {m[key]}, and the spans hold {found}"
    if "rows" in m and m["rows"] != run.row_count():
        yield f"`rows` is {m['rows']}, and {run.row_count()} were numbered"
    if "requests_by_finish" in m:
        finish = run.requests(interrupted=True)["finish_reason"].value_counts()
        if m["requests_by_finish"] != (found := {str(k): int(v) for k, v in finish.items()}):
            yield f"`requests_by_finish` is {m['requests_by_finish']}, and requests.parquet has {found}"
    facts = m.get("facts")
    if facts is not None:
        tables = {
            "spans": spans,
            "forwards": run.forwards(),
            "rebinds": run.rebinds(),
            "requests": run.engine_requests(),
        }
        for table, frame in tables.items():
            if facts.get(table) != len(frame):
                yield f"`facts` counts {facts.get(table)} {table}, and there are {len(frame)}"
    if segment.of(run) is not None:
        if m["requests_expected"] != len(run.requests(interrupted=True)):
            yield f"`requests_expected` is {m['requests_expected']}, and the segment has another number"
        return
    if m["requests_expected"] < 0:
        yield "`requests_expected` is negative"
    yield from _starts(run)


def _starts(run: Run) -> Iterator[str]:
    """Engine processes: as many as wrote parts, at least; together they served what was served."""
    m = run.manifest
    starts = schema.starts_of(m)
    if not starts and m["schema_version"] >= seal.SINCE_SCHEMA and seal.closed(m):
        yield "`starts` names no engine process"
    if not starts or not seal.closed(m):
        return
    sessions = max((part.session for part in run.parts()), default=0) + 1
    if len(starts) < sessions:
        yield f"`starts` has {len(starts)} engine processes, and {sessions} wrote parts"
    for s in starts:
        seconds, requests = (s.get("seconds"), s.get("requests")) if isinstance(s, dict) else (0, -1)
        if (seconds is None) != (requests is None) or min(seconds or 0, requests or 0) < 0:
            yield f"`starts` says that an engine served {requests} requests in {seconds} s"
            return
    served = [s["requests"] for s in starts if s["requests"] is not None]
    if run.complete and len(starts) == 1 and served:
        finish = m.get("requests_by_finish") or {}
        # A client that goes away is not answered, whether its request had ended by then or not.
        every = not finish.get("abort") and not finish.get(schema.REFUSED)
        if served[0] > m["requests_expected"] or (every and served[0] < m["requests_expected"]):
            yield f"`starts` says that {served[0]} requests were answered, of {m['requests_expected']}"
    forwards = run.forwards()
    if len(starts) == 1 and len(forwards) and starts[0]["seconds"] is not None:
        took = float((forwards["launched"] + forwards["seconds"]).max() - forwards["launched"].min())
        if starts[0]["seconds"] < took - 1 and run.complete:
            yield f"`starts` says {starts[0]['seconds']} s, and its forward passes took {took:.1f} s"


def _policy(run: Run) -> Iterator[str]:
    """What the policy rules out did not happen."""
    policy, switches = run.manifest.get("policy") or {}, run.manifest.get("switches") or {}
    spans = run.spans()
    reused = spans[spans["status"] == schema.REUSED]
    cache = policy.get("cache")
    if cache is not None and cache not in ("on", "off", "read_only", "write_only"):
        yield f"`policy` has cache `{cache}`, which does not exist"
    if (cache == "off") != (switches.get("radix_cache") is False) and cache == "off" and switches:
        yield "`policy` has the cache off, and `switches` has it on"
    off = cache == "off" or switches.get("radix_cache") is False
    if off and (len(reused) or len(run.rebinds())):
        yield "the cache was off, and positions were reused"
    if cache == "write_only" and (first := reused[reused["attempt"] == 0]).size:
        yield f"requests were to reuse nothing, and {first['rid'].iloc[0]} did"
    declared: dict[str, Any] = run.manifest.get("heads") or {}
    for h, shape in declared.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(x, int) and x > 0 for x in shape)):
            yield f"`heads` of {h} is {shape}"
    layers = np.asarray(run.manifest.get("telemetry_layers") or [], dtype=object)
    if run.manifest.get("telemetry") and not len(layers):
        yield "telemetry was recorded, and the manifest names no layers"
