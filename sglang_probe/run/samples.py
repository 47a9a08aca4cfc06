"""Requests of a run as a map-style dataset: every sample whole, although rows that many of them share are stored once.

A reused position has the row of the request that computed it (`Run.activations`). Naive storage writes that row again
for every request that reused it; here only its number is repeated, 8 bytes a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.run import schema, shards
from sglang_probe.run.batches import why_absent
from sglang_probe.run.files import RunFiles
from sglang_probe.run.tokens import iter_positions

if TYPE_CHECKING:
    from pathlib import Path

    import torch

Array = np.ndarray[Any, Any]
LEARNED = ("generated", "assistant")
"""Segments whose tokens are the model's: what a drafter is trained to say."""
_ELSEWHERE = {
    schema.CONTINUES: "it goes on in the next segment",
    schema.ENDED_EARLIER: "it ended in the segment before, and this one has its last step alone",
    schema.INTERRUPTED: "its engine ended before it did",
    schema.REFUSED: "it was refused",
}
"""Why requests of these finish reasons are whole in no run."""

_PART = 1 << 18
"""Positions that are looked up at a time when the dataset is made."""


class Samples:
    """Whole requests, in workload order. `torch.utils.data.DataLoader` takes it as it is, with workers too.

    `samples[i]` is a dict: `rid`; `input_ids`, int64 `[n]`; `loss_mask`, bool `[n]`, true for tokens of the segments
    `learned`; and for each hook point its rows `[n, width]` in the recorded dtype. Position n - 1 is the last one that
    has a KV entry: the last sampled token was never fed to the model. Files are mapped when a row of them is first
    asked for and stay mapped.

    Args:
        hook_points: which rows; default: all that were captured.
        missing: what becomes of a request of which a position has no row: `skip` leaves it out (`left_out` says why),
            `nan` fills its rows with NaN, `raise` refuses the run. A request of which the run lacks positions
            themselves, because it began or ended in another segment or was cut short, is left out by `nan` too.
        intervened: whether rows under an intervention count; by default such a position has none.
        learned: names of segments; `generated` is what comes after the prompt.
        ids: leave out requests of which a token id is not known (-1 in `input_ids`): it was withheld, or the recording
            has none.

    Raises:
        RunDirectoryError: a hook point was not captured, no whole request is left, or with `raise` one is not whole.
        ConfigError: `missing` is none of these.
    """

    def __init__(
        self,
        run: RunFiles,
        hook_points: Sequence[str] | None = None,
        *,
        missing: Literal["skip", "nan", "raise"] = "skip",
        intervened: bool = False,
        learned: Sequence[str] = LEARNED,
        ids: bool = False,
    ) -> None:
        if missing not in ("skip", "nan", "raise"):
            raise ConfigError(f"`missing` is {missing!r}", fix="give skip, nan or raise")
        self.hook_points = list(hook_points or run.hook_points)
        if not self.hook_points:
            raise RunDirectoryError(f"{run.path} has no captured rows", fix="record with `hook_points`")
        self._points = [_Point(run, name) for name in self.hook_points]
        self._learned = tuple(learned)
        self.left_out: dict[str, str] = {}
        """Requests that are not whole, by rid, and why."""
        requests, rows, lengths = [], [], []
        # What an interrupted harvest had in flight is asked again under another name; what a segment had is not.
        every = run.requests(interrupted="segment" in run.manifest)
        for some, tokens in iter_positions(run, every, _PART):
            tokens = tokens[tokens["phase"] != schema.OVERSHOOT]
            source = np.where(_counts(run, tokens, self.hook_points, intervened), tokens["source_row"], -1)
            for r, place in _each(some, tokens):
                mine = tokens.iloc[place]
                why = _cut_short(r, mine["position"].to_numpy())
                if why is None and missing != "nan":
                    why = _without_rows(mine, source[place])
                request = _Request.of(r) if why is None else None
                if request is not None and ids and (request.ids_of(len(mine)) < 0).any():
                    why = "a token id of it was withheld or not recorded"
                if request is None or why is not None:
                    self.left_out[r.rid] = str(why)
                    continue
                requests.append(request)
                rows.append(source[place])
                lengths.append(place.stop - place.start)
        if self.left_out and missing == "raise":
            rid, why = next(iter(self.left_out.items()))
            raise RunDirectoryError(
                f"{run.path}: {len(self.left_out)} requests are not whole; {rid}: {why}",
                fix='pass missing="skip" to leave them out, or missing="nan"',
            )
        if not requests:
            why = next(iter(self.left_out.values()), "it has no requests")
            raise RunDirectoryError(f"{run.path} has no request whose every position has a row: {why}")
        self._requests = requests
        self._rows = np.concatenate(rows)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        """Where each sample begins among all positions, int64 `[len + 1]`: for samplers that want lengths."""

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self)} samples, and no number {i}")
        i = int(i) % len(self)
        rows = self.rows_of(i)
        return {**self.tokens(i), **{p.name: p.gather(rows) for p in self._points}}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    @property
    def rids(self) -> list[str]:
        """The request of each sample."""
        return [r.rid for r in self._requests]

    def rows_of(self, i: int) -> Array:
        """Numbers of the rows of sample `i`, int64 `[n]`, those of other requests among them; -1: none (`nan`)."""
        return self._rows[self.offsets[i] : self.offsets[i + 1]]

    def tokens(self, i: int) -> dict[str, Any]:
        """Sample `i` without its rows: `rid`, `input_ids` and `loss_mask`."""
        import torch

        r, n = self._requests[i], int(self.offsets[i + 1] - self.offsets[i])
        mask = np.zeros(n, dtype=bool)
        mask[r.prompt_len :] = "generated" in self._learned
        for name, start, end in r.segments:
            mask[start:end] = name in self._learned
        return {"rid": r.rid, "input_ids": torch.from_numpy(r.ids_of(n)), "loss_mask": torch.from_numpy(mask)}

    def to_hugging_face(self) -> Any:
        """The samples as a `datasets.IterableDataset` that reads them as they are asked for and copies nothing to disk.
        It has as many shards as there are samples, so that it can be split among workers and nodes.

        Raises:
            ConfigError: the package `datasets` is missing.
        """
        try:
            from datasets import IterableDataset
        except ImportError as e:
            raise ConfigError(
                f"the package `datasets` is missing: {e}", fix="pip install sglang-probe[datasets]"
            ) from e
        return IterableDataset.from_generator(_chosen, gen_kwargs={"samples": self, "numbers": list(range(len(self)))})


@dataclass(frozen=True, slots=True)
class _Request:
    """What a sample says of its request."""

    rid: str
    prompt_len: int
    ids: Array
    segments: list[tuple[str, int, int]]

    @classmethod
    def of(cls, r: Any) -> _Request:
        """From a row of `run.requests()`."""
        told = () if r.prompt_ids is None else (r.prompt_ids, () if r.output_ids is None else r.output_ids)
        ids = np.concatenate([np.zeros(0, np.int32), *(np.asarray(x, np.int32) for x in told)])
        segments = [] if r.segments is None else [(s["name"], int(s["start"]), int(s["end"])) for s in r.segments]
        return cls(r.rid, int(r.prompt_len), ids, segments)

    def ids_of(self, n: int) -> Array:
        """Token ids of its first positions, int64 `[n]`; -1: not known."""
        return self.ids[:n].astype(np.int64) if len(self.ids) >= n else np.full(n, -1)


def _chosen(samples: Samples, numbers: list[int]) -> Iterator[dict[str, Any]]:
    for i in numbers:
        yield samples[i]


class _Point:
    """The rows of one hook point, by number. What is mapped stays in the process: a copy for a worker maps anew."""

    def __init__(self, run: RunFiles, name: str) -> None:
        self.name = name
        found = sorted(run.shards_of(name))
        self.width, self.dtype = shards.layout_of(found[0][2])
        self._starts = np.array([start for start, _, _ in found])
        self._files: list[Path] = [path for _, _, path in found]
        self._partial = name in run.selected.partial
        self._mapped: dict[int, Array] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def gather(self, rows: Array) -> torch.Tensor:
        """Rows by number, `[n, width]`; NaN where the number is -1."""
        import torch

        held = rows >= 0
        out = torch.empty((len(rows), self.width), dtype=self.dtype)
        if not held.all():
            out.fill_(float("nan"))
        into = out.view(torch.uint8).numpy()
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        # Bytes, in pieces of consecutive rows: that is as fast as the memory, and knows no dtype.
        ends = np.append(np.flatnonzero((np.diff(rows) != 1) | (np.diff(shard) != 0)) + 1, len(rows))
        begin = 0
        for end in ends.tolist():
            if begin < end and held[begin]:
                number = int(shard[begin])
                places = self._places(number, rows[begin:end])
                into[begin:end] = self._shard(number)[places[0] : places[0] + end - begin]
            begin = end
        return out

    def _places(self, number: int, rows: Array) -> Array:
        places = rows - self._starts[number]
        return shards.place_of(self._files[number], places) if self._partial else places

    def _shard(self, number: int) -> Array:
        """The rows of a shard as bytes, `[n, bytes of a row]`."""
        import torch

        if number not in self._mapped:
            self._mapped[number] = shards.map_rows(self._files[number]).view(torch.uint8).numpy()
        return self._mapped[number]


def _counts(run: RunFiles, tokens: pd.DataFrame, hook_points: Sequence[str], intervened: bool) -> Array:
    """Which positions have a row at every hook point, bool `[n]`."""
    source = tokens["source_row"].to_numpy()
    have = np.logical_and.reduce([run.holds(name, source) for name in hook_points])
    return have if intervened else have & tokens["intervention"].isna().to_numpy()


def _each(requests: pd.DataFrame, tokens: pd.DataFrame) -> Iterator[tuple[Any, slice]]:
    """Requests in their order, each with the places of its positions."""
    rids = tokens["rid"].to_numpy()
    edges = np.flatnonzero(np.append(True, rids[1:] != rids[:-1])) if len(rids) else np.zeros(0, np.int64)
    ends = np.append(edges[1:], len(rids))
    at = {rids[a]: slice(int(a), int(b)) for a, b in zip(edges, ends, strict=True)}
    yield from ((r, at[r.rid]) for r in requests.itertuples() if r.rid in at)


def _cut_short(r: Any, position: Array) -> str | None:
    """Why a run lacks positions of a request, in words; None: it has all.

    Args:
        r: its row of `run.requests()`.
        position: those that the run has, int64 `[n]`.
    """
    if r.finish_reason in _ELSEWHERE:
        return _ELSEWHERE[r.finish_reason]
    if pd.isna(r.prompt_len):
        return "the length of its prompt is not known"
    if position[0] != 0:
        return f"its first {position[0]} positions are in another run"
    whole = int(r.prompt_len) + max(int(r.output_len) - 1, 0)  # the last sampled token was never fed to the model
    if np.array_equal(position, np.arange(whole)):
        return None
    return f"the run has {len(position)} positions of it, and it has {whole}"


def _without_rows(tokens: pd.DataFrame, source: Array) -> str | None:
    """Which positions of a request have no row, in words; None: all have one."""
    if (source >= 0).all():
        return None
    return f"{int((source < 0).sum())} of {len(source)} positions have no row: {why_absent(tokens[source < 0])}"
