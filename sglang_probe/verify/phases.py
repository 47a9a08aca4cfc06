"""The phase of every computed position, from what the ledger knows without it."""

from __future__ import annotations

from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check


def phases_fit(run: Run) -> Check:
    """Prefill ends with the prompt, decode begins after it, and a retracted request goes on from what it had kept.

    A request that is retracted after position `p - 1` has `p + 1` tokens, the last of which was sampled and has no KV
    entry. So its next attempt prefills `[0, p + 1)`, unless the step that computed `p - 1` was in flight: then that
    step's output is discarded (`overshoot`), and `p` is where its predecessor ended.
    """
    name = "phases"
    claim = "prefill ends with the prompt, and an attempt prefills what the one before it kept and the token it sampled"
    spans, requests = run.spans(), run.requests(interrupted=True)
    spans = spans[(spans["status"] == schema.COMPUTED) & ~spans["rid"].isin(segment.not_wholly_here(run))]
    prompt_len = spans["rid"].map(dict(zip(requests["rid"], requests["prompt_len"], strict=True))).astype(float)
    spans, prompt_len = spans[prompt_len.notna()], prompt_len[prompt_len.notna()]

    steps = spans["phase"].isin(schema.STEP_PHASES)
    misplaced = (steps & (spans["start"] < prompt_len)) | (
        (spans["phase"] == schema.PREFILL) & (spans["end"] > prompt_len)
    )
    misplaced |= ~steps & ((spans["phase"] == schema.PREFILL) != (spans["attempt"] == 0))
    if misplaced.any():
        s = spans[misplaced].iloc[0]
        violation = f"{s['rid']} positions {s['start']} to {s['end']} of attempt {s['attempt']} cannot be {s['phase']}"
        return Check(name, claim, len(spans), "spans", violation)

    key = ["rid", "attempt"]
    kept = spans[spans["phase"] == schema.DECODE].groupby(key)["end"].max()
    prefilled = spans[~steps].groupby(key)["end"].max()
    # An attempt whose prefill was cut short by the next retraction or an abort says nothing; one that decoded does.
    whole = set(spans[steps].groupby(key).size().index)
    for (rid, attempt), end in kept.items():
        after = (rid, attempt + 1)
        if after in whole and (begins := int(prefilled.get(after, -1))) != end + 1:
            violation = f"{rid}: attempt {attempt} kept {end} positions, and attempt {attempt + 1} prefills {begins}"
            return Check(name, claim, len(spans), "spans", violation)
    return Check(name, claim, len(spans), "spans")
