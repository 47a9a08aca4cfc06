"""Causes of computed tokens (`sglang_probe.run.causes`) by segment and family, and what would save them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.run.causes import Cause, autopsy, later_segment
from sglang_probe.run.joined import joined_or_one
from sglang_probe.run.run import Run
from sglang_probe.studies.base import Measured
from sglang_probe.studies.why.differ import Difference, Differs, compare

REMEDIES: Mapping[str, str] = {
    f"{Cause.DIVERGED}: {Difference.TIMESTAMP}": "move the date, time or identifier to the end of the prompt, or round "
    "it to what the model needs: everything after it is computed again whenever it changes",
    f"{Cause.DIVERGED}: {Difference.MARKER}": "move what changes from request to request (a marker, a counter, a name) "
    "after what stays the same",
    f"{Cause.DIVERGED}: {Difference.ORDER}": "send pieces (tools, documents, examples) always in the same order",
    f"{Cause.DIVERGED}: {Difference.TEXT}": "put the text that is repeated before the text that differs",
    str(Cause.EVICTED): "the cache is too small for this traffic: more KV tokens (`mem_fraction_static`, "
    "`max_total_tokens`), fewer requests at a time, or requests of one prefix sent together",
    str(Cause.WINDOW): "the sliding layers' entries of the prefix were dropped: a larger pool for them "
    "(`swa_full_tokens_ratio`), or requests of one prefix sent together",
    str(Cause.FLUSHED): "the cache was emptied: by a flush, an update of the weights, or a restart",
    str(Cause.PAGE_ROUNDING): "a smaller page size: entries are shared in whole pages only",
    str(Cause.NOT_YET_PUBLISHED): "let the first request of a prefix go ahead: entries are shared once its chunk, its "
    "prefill or its end has been processed",
    str(
        Cause.NEVER_PUBLISHED
    ): "the earlier request gave nothing to the cache: it asked so, or was aborted or retracted",
    str(Cause.NAMESPACE): "the same prefix under another `cache_salt`, `extra_key`, adapter or steering: use one where "
    "separation is not needed",
    str(Cause.LOGPROB_START): "do not ask log-probabilities of prompt tokens that you do not read "
    "(`logprob_start_len=-1`)",
    str(Cause.RETRACTION): "requests were retracted: more KV tokens, fewer requests at a time "
    "(`max_running_requests`), or a higher `schedule_conservativeness`",
    str(Cause.ASKED): "the requests asked not to read the cache",
    str(Cause.CACHE_OFF): "the cache is switched off",
}
"""What to do, by cause, in words. Nothing is said of what cannot be saved."""

MOST_COMPARED = 20_000
"""Diverged requests that are compared with their nearest one, at most."""


@dataclass(frozen=True)
class WhyResult(Measured):
    """Why tokens were computed."""

    run: str
    rid: str | None
    causes: pd.DataFrame
    """cause, tokens, share, requests."""
    by_segment: pd.DataFrame
    """segment, cause, tokens."""
    by_group: pd.DataFrame
    """group, computed, reused, and the commonest avoidable cause with its tokens."""
    remedies: pd.DataFrame
    """what, tokens, requests, remedy, example: what would be saved, most first."""
    pieces: pd.DataFrame
    """Every run of positions (`sglang_probe.run.causes.Autopsy.pieces`), with `difference` where it diverged."""
    computed: int
    reused: int
    grouped_by: str
    notes: Sequence[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The summary."""
        return {
            "run": self.run,
            "rid": self.rid,
            "computed": self.computed,
            "reused": self.reused,
            "causes": {r.cause: int(r.tokens) for r in self.causes.itertuples()},
            "remedies": self.remedies.to_dict("records"),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table by name."""
        return {
            "causes": self.causes,
            "by_segment": self.by_segment,
            "by_group": self.by_group,
            "remedies": self.remedies,
            "pieces": self.pieces,
        }


def why(path: Path, *, rid: str | None = None, by: str = "family", model: Path | None = None) -> WhyResult:
    """Study a run, or one request of it; or the closed segments of a live recording, by their folder.

    Args:
        by: what requests are grouped by: `family`, `rid`, a label that they carry (`session`, `tenant`, ...), or an
            axis that the workload labelled.
        model: folder of the tokenizer; default: the one that the run names.

    Raises:
        RunDirectoryError: the run does not say why (see `sglang_probe.run.causes.autopsy`), or has no such request.
    """
    run = joined_or_one(path)
    found = autopsy(run)
    pieces, requests = found.pieces, run.requests(interrupted=True)
    if rid is not None:
        if rid not in set(requests["rid"]):
            raise RunDirectoryError(f"{path} has no request `{rid}`", fix=f"it has {_some(requests['rid'])}")
        pieces = pieces[pieces["rid"] == rid].reset_index(drop=True)
    notes = []
    text, problem = _text_of(run, model) if found.text_known else (None, None)
    if problem:
        notes.append(problem)
    if not found.text_known:
        notes.append(
            "Prompts are known by keyed hashes of their prefixes: where they diverge is exact, and whether what "
            "follows is an old text after a new prefix is not known; it counts as diverged as far as the nearest "
            "request is long."
        )
    if later_segment(run):
        notes.append(
            "Earlier segments are not looked at: what is not seen in this one may be in them, so it counts neither as "
            "new nor as computed again. Give the folder of the recording: its segments are then looked at together."
        )
    pieces = pieces.assign(tokens=pieces["end"] - pieces["start"])
    prompts = _prompts(requests) if found.text_known else {}
    differences, left = _differences(pieces, prompts, text)
    if left:
        notes.append(f"{left:,} diverged requests were not compared with their nearest one, and count as another text.")
    pieces["difference"] = [
        str(differences[r.rid].kind) if r.cause == Cause.DIVERGED and r.rid in differences else None
        for r in pieces.itertuples()
    ]
    what = np.where(
        pieces["difference"].notna(), pieces["cause"] + ": " + pieces["difference"].fillna(""), pieces["cause"]
    )
    group = groups_of(requests, run.tree(), by, path)
    spans = run.spans()
    spans = spans if rid is None else spans[spans["rid"] == rid]
    reused = spans[spans["status"] == "reused"]
    return WhyResult(
        run=str(path),
        rid=rid,
        causes=_causes(pieces),
        by_segment=_by_segment(pieces, requests),
        by_group=_by_group(pieces, reused, group),
        remedies=_remedies(pieces.assign(what=what), differences, prompts, text),
        pieces=pieces,
        computed=int(pieces["tokens"].sum()),
        reused=int((reused["end"] - reused["start"]).sum()),
        grouped_by=by,
        notes=notes,
    )


def _some(rids: pd.Series) -> str:
    """What requests are called, of few all."""
    shown = ", ".join(f"`{rid}`" for rid in rids.head(10))
    left = len(rids) - 10
    return f"{shown or 'none'}{f' and {left:,} more: column `rid` of `requests.parquet`' if left > 0 else ''}"


def _text_of(run: Run, model: Path | None) -> tuple[Callable[[Sequence[int]], str] | None, str | None]:
    folder = model or Path(str(run.manifest.get("model_path") or ""))
    try:
        pieces = Vocabulary.load(folder).pieces
    except (ProbeError, OSError, ValueError) as e:
        return None, f"Positions are told, and no text: the tokenizer could not be read ({e}); give --model."
    return lambda ids: b"".join(pieces[i] for i in ids if 0 <= i < len(pieces)).decode(errors="replace"), None


def _prompts(requests: pd.DataFrame) -> dict[str, list[int]]:
    known = requests[requests["prompt_ids"].notna()]
    return {str(r.rid): [*r.prompt_ids, *([] if r.output_ids is None else r.output_ids)] for r in known.itertuples()}


def _differences(
    pieces: pd.DataFrame, prompts: Mapping[str, list[int]], text: Callable[[Sequence[int]], str] | None
) -> tuple[dict[str, Differs], int]:
    diverged = pieces[pieces["cause"] == Cause.DIVERGED].drop_duplicates("rid")
    out: dict[str, Differs] = {}
    for r in diverged.head(MOST_COMPARED).itertuples():
        ours, theirs = prompts.get(str(r.rid)), prompts.get(str(r.nearest))
        if ours is None or theirs is None:
            out[str(r.rid)] = Differs(Difference.TEXT, int(r.common))
        else:
            out[str(r.rid)] = compare(ours, theirs, int(r.common), text)
    return out, max(len(diverged) - MOST_COMPARED, 0)


def _causes(pieces: pd.DataFrame) -> pd.DataFrame:
    by = pieces.groupby("cause").agg(tokens=("tokens", "sum"), requests=("rid", "nunique")).reset_index()
    by["share"] = by["tokens"] / max(int(by["tokens"].sum()), 1)
    return by.sort_values("tokens", ascending=False, kind="stable", ignore_index=True)


def _by_segment(pieces: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    segments = dict(zip(requests["rid"], requests["segments"], strict=True))
    lengths = dict(zip(requests["rid"], requests["prompt_len"], strict=True))
    counts: dict[tuple[str, str], int] = {}
    for r in pieces.itertuples():
        for s in segments.get(r.rid, ()):
            n = min(int(r.end), s["end"]) - max(int(r.start), s["start"])
            if n > 0:
                counts[s["name"], r.cause] = counts.get((s["name"], r.cause), 0) + n
        beyond = lengths.get(r.rid)
        if beyond is not None and not pd.isna(beyond) and r.end > beyond:
            n = int(r.end) - max(int(r.start), int(beyond))
            counts["generated", r.cause] = counts.get(("generated", r.cause), 0) + n
    frame = pd.DataFrame([(s, c, n) for (s, c), n in counts.items()], columns=["segment", "cause", "tokens"])
    return frame.sort_values(["segment", "tokens"], ascending=[True, False], ignore_index=True)


def groups_of(requests: pd.DataFrame, tree: pd.DataFrame, by: str, path: Path) -> pd.Series:
    """What each request belongs to, by rid.

    Raises:
        RunDirectoryError: no request has such a label, and no workload such an axis.
    """
    if by == "rid":
        return pd.Series(requests["rid"].to_numpy(), index=requests["rid"])
    if by == "family":
        return pd.Series(requests["family"].fillna("(none)").to_numpy(), index=requests["rid"])
    told = tree[tree["labels"].notna()].drop_duplicates("rid")
    own = {r.rid: json.loads(r.labels) for r in told.itertuples()}
    asked = {axis for labels in own.values() for axis in labels}
    if by in asked:
        return pd.Series([own.get(rid, {}).get(by, "(none)") for rid in requests["rid"]], index=requests["rid"])
    axes = {label["axis"] for labels in requests["labels"] if labels is not None for label in labels}
    if by not in axes:
        named = ", ".join(f"`{a}`" for a in ["family", "rid", *sorted(asked | axes)])
        raise RunDirectoryError(f"{path} has no axis `{by}`", fix=f"group by one of {named}")
    names = [
        next((label["name"] for label in labels if label["axis"] == by), "(none)") if labels is not None else "(none)"
        for labels in requests["labels"]
    ]
    return pd.Series(names, index=requests["rid"])


_NOT_SAVED = tuple(map(str, (Cause.NEVER_SEEN, Cause.LAST_TOKEN, Cause.NOT_IN_SEGMENT, Cause.UNKNOWN)))
"""New, always computed, or nobody knows."""


def _by_group(pieces: pd.DataFrame, reused: pd.DataFrame, group: pd.Series) -> pd.DataFrame:
    named = pieces.assign(group=pieces["rid"].map(group).fillna("(none)"))
    again = (reused["end"] - reused["start"]).groupby(reused["rid"].map(group).fillna("(none)")).sum()
    rows = []
    for name, own in named.groupby("group", sort=False):
        avoidable = own[~own["cause"].isin(_NOT_SAVED)].groupby("cause")["tokens"].sum().sort_values(ascending=False)
        rows.append(
            {
                "group": name,
                "requests": own["rid"].nunique(),
                "computed": int(own["tokens"].sum()),
                "reused": int(again.get(name, 0)),
                "avoidable": int(avoidable.sum()),
                "mostly": str(avoidable.index[0]) if len(avoidable) else "",
            }
        )
    columns = ["group", "requests", "computed", "reused", "avoidable", "mostly"]
    return pd.DataFrame(rows, columns=columns).sort_values("avoidable", ascending=False, ignore_index=True)


def _remedies(
    pieces: pd.DataFrame,
    differences: Mapping[str, Differs],
    prompts: Mapping[str, list[int]],
    text: Callable[[Sequence[int]], str] | None,
) -> pd.DataFrame:
    rows = []
    for what, own in pieces.groupby("what"):
        name = f"{Cause.DIVERGED}: {Difference.TEXT}" if what == str(Cause.DIVERGED) else str(what)
        if name in REMEDIES:
            top = own.sort_values("tokens", ascending=False).iloc[0]
            rows.append(
                {
                    "what": name,
                    "tokens": int(own["tokens"].sum()),
                    "requests": own["rid"].nunique(),
                    "remedy": REMEDIES[name],
                    "example": _example(top, differences.get(str(top["rid"])), prompts, text),
                }
            )
    frame = pd.DataFrame(rows, columns=["what", "tokens", "requests", "remedy", "example"])
    return frame.sort_values("tokens", ascending=False, kind="stable", ignore_index=True)


def _example(
    piece: pd.Series,
    differs: Differs | None,
    prompts: Mapping[str, list[int]],
    text: Callable[[Sequence[int]], str] | None,
) -> str:
    where = f"{piece['rid']}, positions {piece['start']} to {piece['end']}"
    if piece["cause"] != Cause.DIVERGED or not isinstance(piece["nearest"], str):
        return where
    where += f", diverged at {piece['common']} from {piece['nearest']}"
    if differs is None or text is None or not (differs.ours or differs.theirs):
        return where
    before = prompts[str(piece["rid"])][max(differs.at - 8, 0) : differs.at]
    old, new = _short(text(differs.theirs)), _short(text(differs.ours))
    return f"{where}: after {_short(text(before))!r} came {old!r} there and {new!r} here"


def _short(shown: str) -> str:
    return shown if len(shown) <= 60 else shown[:57] + "..."
