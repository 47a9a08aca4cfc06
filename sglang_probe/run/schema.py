"""Tables of the ledger and their columns. One source of truth for writer, reader and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 6
"""6: the table `tree` tells what the radix tree took, gave and lost. 5: a closed run has a seal (`run.seal`), its
manifest counts the ledger's facts, and the embedding oracle names its weights. 4: the manifest has `starts`
(`sessions` before), and digests of forced outputs and kept sets. 3: a shard may hold some rows of its part only, and
says which (`run.shards.INDEX_KEY`)."""


def starts_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each engine process that wrote a run its `seconds` (None: it was killed) and `requests`."""
    return list(manifest.get("starts", manifest.get("sessions", [])))


COMPUTED = "computed"
REUSED = "reused"
UNREQUESTED = "unrequested"
DROPPED = "dropped"
"""Positions whose facts were lost: because the disk was slower than a live server, or because their request could not
be accounted for (finish reason `unaccounted`)."""

PREFILL = "prefill"
DECODE = "decode"
RECOMPUTE = "recompute"
OVERSHOOT = "overshoot"
"""A decode step whose output SGLang discarded, because its request had stopped (its KV is published) or was retracted
(its KV is freed)."""

RANK_SHIFT = 40
"""Numbers of forwards and rows of data-parallel rank r begin at r << 40, so that each belongs to one ledger."""

STEP_PHASES = (DECODE, OVERSHOOT)
"""Phases in which each position of a span has a forward pass of its own, numbered consecutively."""

SPANS = pa.schema(
    [
        ("rid", pa.string()),
        ("attempt", pa.int32()),  # 0, and one more after each retraction
        ("start", pa.int32()),  # token positions [start, end) of prompt + output
        ("end", pa.int32()),
        ("status", pa.string()),  # computed | reused | unrequested | dropped
        ("phase", pa.string()),  # prefill | decode | recompute | overshoot
        # computed: the forward pass of position `start`. In decode and overshoot, position start + i was computed by
        # forward_id + i; in prefill all positions by the same one. reused: the forward that first attended to it.
        ("forward_id", pa.int64()),
        ("chunk", pa.int32()),  # number of the prefill chunk within the attempt; -1 in decode
        ("tier", pa.string()),  # device for reused spans, else null
        # Row of position start + i in the row store is row_start + i * row_step; -1: no rows were captured.
        ("row_start", pa.int64()),
        ("row_step", pa.int32()),
        # reused: the request and attempt that computed the entry, at the same positions; null: before the recording.
        ("origin_rid", pa.string()),
        ("origin_attempt", pa.int32()),
        # Under which interventions the entry was written: `intervention` of the table `interventions`. Computed: those
        # of the request, from its first changed position on; reused: those of the origin. Null: under none. The entry,
        # and the row, are then those of the plain model.
        ("intervention", pa.string()),
    ]
)

INTERVENTIONS = pa.schema(
    [
        # Requests that ran under interventions, in every part with a span of theirs.
        ("rid", pa.string()),
        ("intervention", pa.string()),  # hash of the specification (`sglang_probe.steering.spec.Spec.id`)
        ("prompt_len", pa.int32()),
        (
            "onset",
            pa.int32(),
        ),  # first position that is changed; later ones may be left alone, and attend to changed ones
        ("spec", pa.string()),  # JSON: `Spec.from_json` reads it, and says which positions are changed
    ]
)

GATES = pa.schema(
    [
        # Requests whose interventions wait for a probe, in every part with a span of theirs after the decision.
        ("rid", pa.string()),
        ("intervention", pa.string()),  # hash of the specification that was asked, with its gate
        ("probe", pa.string()),
        ("hook_point", pa.string()),
        ("position", pa.int32()),  # of the row that was scored: the prompt's last
        ("attempt", pa.int32()),
        ("forward_id", pa.int64()),  # that computed the row; -1: nothing was recorded then
        ("score", pa.float32()),
        ("threshold", pa.float32()),
        ("opened", pa.bool_()),  # score > threshold: the gated steps act
        ("spec", pa.string()),  # JSON, as in `interventions`
    ]
)

BUDGET = pa.schema(
    [
        # What became of the budget of interventions (`steer: {budget_ms: ...}`), in the order of time.
        ("forward_id", pa.int64()),  # exceeded: measured in this forward; else the first one launched after the event
        ("at", pa.float64()),  # unix seconds
        ("event", pa.string()),  # exceeded | within | unsteered
        ("milliseconds", pa.float32()),  # median of the forwards that counted
        ("budget_ms", pa.float32()),
        ("rid", pa.string()),  # unsteered: the request, and what it asked; else null
        ("intervention", pa.string()),
    ]
)

MONITORED = pa.schema(
    [
        # Decode rows that a server's monitor read; `monitor` of the manifest names the columns.
        ("rid", pa.string()),
        ("attempt", pa.int32()),
        ("position", pa.int32()),
        ("forward_id", pa.int64()),
        ("probability", pa.float32()),  # with which the row was read
        ("entropy", pa.float32()),  # nats, of the next-token distribution; null: the rule does not ask
        ("values", pa.list_(pa.float32())),  # one for each column; NaN: it could not be computed
    ]
)

WITHHELD = pa.schema(
    [
        # Positions [start, end) of a request, in every attempt, whose rows were taken out of this run; and their token
        # ids, unless the reason is `neighbour`.
        ("rid", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("reason", pa.string()),  # pii:<kind> | neighbour | unknown
    ]
)

REBINDS = pa.schema(
    [
        # From forward `at_forward` on, positions [start, end) of this attempt attend to the origin's entries.
        ("rid", pa.string()),
        ("attempt", pa.int32()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("at_forward", pa.int64()),
        ("origin_rid", pa.string()),
        ("origin_attempt", pa.int32()),
    ]
)

PUBLISHED, MATCHED, EVICTED, FLUSHED, OPENED = "published", "matched", "evicted", "flushed", "opened"

LAST_TOKEN, LOGPROBS, ASKED, CACHE_OFF = "last token", "logprob_start", "asked", "cache off"

TREE = pa.schema(
    [
        # What the radix tree took, gave and lost, as the engine's process saw it.
        ("order", pa.int64()),  # of all events since `opened`
        ("at_forward", pa.int64()),  # the first forward that is launched after it; matched: the forward that used it
        # opened: a recording begins, with order 0. published: the tree holds positions [0, end) of the request, of
        # which [start, end) are new to it or took the place of older ones. matched: the tree gave [0, end). evicted,
        # flushed: it lost entries.
        ("event", pa.string()),
        ("rid", pa.string()),  # published and matched; null: of a request that this recording does not know
        ("attempt", pa.int32()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("namespace", pa.string()),  # keyed hash of what separates prefixes beside tokens; null: nothing does
        ("limit", pa.int32()),  # matched: no more positions than these could be given; null: not known
        ("limited_by", pa.string()),  # matched: why so: last token | logprob_start | asked | cache off
        ("tokens", pa.int32()),  # evicted: KV slots that were freed
        ("labels", pa.string()),  # matched: JSON of what the request says that it belongs to; null: nothing
        ("sliding", pa.bool_()),  # matched: only where the entries of sliding layers were there too; null: no such pool
    ]
)

FORWARDS = pa.schema(
    [
        ("forward_id", pa.int64()),
        ("mode", pa.string()),  # extend | mixed | decode
        ("requests", pa.int32()),
        ("prefill_tokens", pa.int32()),
        ("decode_tokens", pa.int32()),
        ("slots", pa.int32()),  # KV slots that SGLang allocated for it: its own count of the tokens
        ("graph", pa.bool_()),  # replayed from a graph, else eager
        ("launched", pa.float64()),  # unix seconds
        ("seconds", pa.float64()),  # launch to result processed
        ("waiting", pa.int32()),  # queue length at launch
        ("row_start", pa.int64()),
        # Positions of requests that could not be accounted for (finish reason `unaccounted`): of their spans and rows
        # nothing is written from then on. Null in runs that were recorded before there was this column.
        ("unaccounted", pa.int32()),
        # Number of weight updates of the engine before the launch; `weights` of the manifest says which. Null as above.
        ("weights", pa.int32()),
    ]
)

ENGINE_REQUESTS = pa.schema(
    [
        ("rid", pa.string()),
        ("prompt_len", pa.int32()),
        ("output_len", pa.int32()),
        ("cached_tokens", pa.int32()),  # SGLang's own count
        ("retractions", pa.int32()),
        ("finish_reason", pa.string()),
        ("output_ids", pa.list_(pa.int32())),
    ]
)

PROMPTS = pa.schema(
    [
        # Of a live recording, as its privacy level allows: one of the two, or no such table.
        ("rid", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_hash", pa.string()),  # keyed: equal prompts have equal hashes within one server process
        # Keyed hash of the first i + 1 tokens of prompt and output: equal prefixes have equal hashes, as above.
        ("prefix_hashes", pa.list_(pa.uint64())),
    ]
)

_PER_HEAD = pa.list_(pa.float32())

TELEMETRY = pa.schema(
    [
        # One row per measured decode step and layer; lists have one entry per query head. What the numbers are:
        # `sglang_probe.engine.capture.telemetry` and `sglang_probe.attention.telemetry`.
        ("rid", pa.string()),
        ("attempt", pa.int32()),
        ("position", pa.int32()),
        ("forward_id", pa.int64()),
        ("layer", pa.int16()),
        ("entropy", _PER_HEAD),  # over the logarithm of the number of visible keys
        ("entropy_without_sinks", _PER_HEAD),  # the rest renormalised
        ("support", _PER_HEAD),  # exp(entropy in nats)
        ("mass_sinks", _PER_HEAD),
        ("mass_system", _PER_HEAD),  # NaN: the request did not say where its system prompt is
        ("mass_prompt", _PER_HEAD),  # the rest of the prompt, with the system prompt where that is NaN
        ("mass_window", _PER_HEAD),
        ("mass_generated", _PER_HEAD),
        ("jump", _PER_HEAD),  # NaN until `memory` steps were measured
        ("top_positions", pa.list_(pa.int32())),  # `top_k` entries per head, most weight first; -1: fewer keys
        ("top_weights", _PER_HEAD),
    ]
)

_LABEL = [("axis", pa.string()), ("name", pa.string()), ("start", pa.int32()), ("end", pa.int32())]

_POSITIONS = pa.list_(pa.list_(pa.int32()))  # for each answer

TRUTH = pa.schema(
    [
        # What is known of requests that have one right answer (`workload.request.Truth`); null in all others.
        ("task", pa.string()),
        ("context_len", pa.int32()),
        ("continuation_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("answer_steps", pa.list_(pa.int32())),
        ("needed_content", _POSITIONS),
        ("needed_causal", _POSITIONS),
        ("depth", pa.float64()),
    ]
)

REQUESTS = pa.schema(
    [
        *ENGINE_REQUESTS,
        ("index", pa.int64()),  # number of the request in the workload
        ("family", pa.string()),  # requests that share a prefix by design
        ("prompt_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.struct([("name", pa.string()), ("start", pa.int32()), ("end", pa.int32())]))),
        ("sampling_params", pa.string()),  # JSON
        ("refusal", pa.string()),  # why the request was refused (`finish_reason: refused`), else null
        # Token classes along axes of the user's own; null in runs that have none.
        ("labels", pa.list_(pa.struct(_LABEL))),
        *TRUTH,
        # Of a request that attended to a kept set, else null: its key, the positions that the set is about, and how
        # many of them each kv head kept (layer by layer, at the first step of a selection).
        ("evict", pa.string()),
        ("cache_len", pa.int32()),
        ("kept", pa.list_(pa.int32())),
    ]
)

LIVE_REQUESTS = REQUESTS.append(pa.field("prompt_hash", pa.string()))
"""`requests.parquet` of a segment of a live recording; token ids are null unless its privacy level is `ids`."""

ADDED = {
    "forwards": ("unaccounted", "weights"),
    "spans": ("intervention",),
    "prompts": ("prefix_hashes",),
    "tree": ("labels", "sliding"),
}
"""Columns of the ledger's tables that runs of earlier releases do not have, by table; they are read as null."""

NEVER_NULL = {
    "spans": ("rid", "attempt", "start", "end", "status", "forward_id", "chunk", "row_start", "row_step"),
    "forwards": tuple(name for name in FORWARDS.names if name not in ADDED["forwards"]),
    "rebinds": ("rid", "attempt", "start", "end", "at_forward"),
    "requests": tuple(name for name in ENGINE_REQUESTS.names if name != "output_ids"),  # as privacy allows
    "prompts": ("rid",),
    "tree": ("order", "at_forward", "event"),
    "interventions": tuple(INTERVENTIONS.names),
    "gates": tuple(GATES.names),
    "budget": ("forward_id", "at", "event", "milliseconds", "budget_ms"),
    "withheld": tuple(WITHHELD.names),
    "monitored": ("rid", "attempt", "position", "forward_id", "probability", "values"),
    "telemetry/part-": tuple(TELEMETRY.names),
}
"""Columns of the ledger's tables that have a value in every row."""

REQUESTS_NEVER_NULL = ("rid", "output_len", "finish_reason", "index", "segments")
"""The same of `requests.parquet`."""

REMEMBERED_PAGES = 1 << 18
"""Pages that a recorder remembers the owners of, at least: about 30 MB in each of two generations. A reused position of
unknown origin in a run of fewer positions was not forgotten."""

CONTINUES = "continues"
"""Finish reason of a request that was in flight when its segment was closed: the next segment goes on with it."""

ENDED_EARLIER = "ended earlier"
"""Finish reason of a request that ended in the segment before; a discarded step of it was still running."""

INTERRUPTED = "interrupted"
"""Finish reason of a request that was in flight when its engine died; a resumed run asks it again as `<rid>~<n>`."""

UNACCOUNTED = "unaccounted"
"""Finish reason of a request of which SGLang did what the ledger does not expect, or of which the probe failed: from
that moment on its positions are `dropped`. The manifest says why (`unaccounted`). Others are recorded as ever."""

REFUSED = "refused"
"""Finish reason of a request that SGLang refused: the rest is served. `refusal` says why. One that is refused before it
is queued (too long, a bad sampling value) has no position and an empty prompt. One that the scheduler refuses later (a
regular expression that does not compile, a session that does not exist, ...) is served as a prompt of one token, and
that is the prompt in the ledger. Also the name of that token's segment."""

REFUSED_TOKEN = 0
"""The prompt that SGLang serves in place of a refused one (`Req.set_finish_with_abort`)."""
