"""Reading a run directory. Needs neither SGLang nor a GPU; works on data copied from another machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from sglang_probe.run import batches
from sglang_probe.run import tokens as positions
from sglang_probe.run.files import RunFiles
from sglang_probe.run.samples import LEARNED, Samples
from sglang_probe.run.scores import read_scores
from sglang_probe.run.telemetry import read_telemetry
from sglang_probe.run.tokens import PART
from sglang_probe.run.tokens import iter_tokens as token_frames

if TYPE_CHECKING:
    import torch


def load_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises:
        RunDirectoryError: there is no manifest, or it was written by a newer schema.
    """
    return Run(Path(path))


class Run(RunFiles):
    """One recorded run. Frames are plain pandas; columns are documented in `sglang_probe.run.schema`.

    Every ledger table has the column `dp_rank` in front: the data-parallel rank whose ledger it comes from.
    """

    def telemetry(self) -> pd.DataFrame:
        """Attention telemetry that was recorded while requests were served (`telemetry` of the configuration): one row
        per measured decode step, layer and head. Columns: `sglang_probe.run.telemetry.read_telemetry`.

        Raises:
            RunDirectoryError: none was recorded.
        """
        return read_telemetry(self)

    def scores(self) -> pd.DataFrame:
        """Scores of probes that were written in the step (`scores` of the configuration): one row per position that has
        any, in the order of `tokens()`.

        Columns: rid, position, token_id, segment, status, phase, forward_id and intervention as in `tokens()`, and one
        of each probe by its name, float32: `x @ w` of the residual stream after its layer; NaN where its hook point
        does not hold the position. A reused position has the score of its origin.

        Raises:
            RunDirectoryError: none were recorded.
        """
        return read_scores(self)

    def tokens(self, *, interrupted: bool = False) -> pd.DataFrame:
        """One row per position of each served request's last attempt (`interrupted` as in `requests`).

        Columns: rid, position, token_id, segment (class of a prompt token; `generated` after the prompt), status,
        phase, forward_id, row (captured by this position's own forward; -1: none), origin_rid and origin_attempt (of a
        reused position; null: computed before the recording), source_row (its own row, or the row of its origin;
        -1: none), covered (whether this run has the forward pass that computed the position: not if it was reused from
        an entry of unknown origin or of another segment), and intervention (under which the entry was written, a name
        of `interventions()`; null: none, so that entry and row are those of the plain model). Token ids of discarded
        overshoot positions are those of the last output; -1 where a live recording has no ids.
        """
        return positions.read_tokens(self, interrupted=interrupted)

    def iter_tokens(self, positions: int = PART) -> Iterator[pd.DataFrame]:
        """What `tokens()` gives, whole requests at a time, in its order: for runs whose frame would be large.

        Beside a frame it takes the memory of the spans, and 4 bytes for each position: token ids.

        Args:
            positions: of a frame; a longer request has a frame of its own. The index begins again with each frame.
        """
        return token_frames(self, positions)

    def tokens_of(self, rid: str) -> pd.DataFrame:
        """As `tokens()` for one request, without token ids and segments.

        Raises:
            RunDirectoryError: there is no such request.
        """
        return positions.tokens_of(self, rid)

    def activations(
        self,
        rid: str,
        hook_point: str,
        *,
        missing: Literal["raise", "nan"] = "raise",
        first: int = 0,
        intervened: bool = False,
    ) -> torch.Tensor:
        """All activations of one request, `[positions, width]`, reused positions gathered from their origins' rows.

        Covers every position from `first` on that has a KV entry: prompt and output but the last sampled token (and
        without a discarded overshoot step). Positions from the first one on that an intervention changed have no row
        of the plain model; `intervened` takes the rows that they have.

        Raises:
            RunDirectoryError: no such request; or a position has no row anywhere in the run, e.g. because its entry was
                computed before the recording began, or because the hook point does not hold it. With `missing="nan"`
                such rows are NaN instead.
        """
        tokens = self.tokens_of(rid)
        return batches.activations(self, tokens, hook_point, missing=missing, first=first, intervened=intervened)

    def samples(
        self,
        hook_points: Sequence[str] | None = None,
        *,
        missing: Literal["skip", "nan", "raise"] = "skip",
        intervened: bool = False,
        learned: Sequence[str] = LEARNED,
    ) -> Samples:
        """Whole requests as a map-style dataset, which `torch.utils.data.DataLoader` takes as it is: rows that requests
        share are stored once and gathered when a sample is asked for. What a sample holds, and the arguments:
        `sglang_probe.run.samples.Samples`.

        Raises:
            RunDirectoryError: a hook point was not captured, or no whole request is left.
        """
        return Samples(self, hook_points, missing=missing, intervened=intervened, learned=learned)

    def iter_batches(
        self,
        hook_point: str,
        *,
        batch_size: int,
        where: str | Callable[[pd.DataFrame], Any] | None = None,
        weight: str | Path | pd.DataFrame = "unique",
        shuffle: bool = True,
        seed: int = 0,
        intervened: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Batches `[batch_size, width]` of captured rows, one epoch; feeds SAE trainers directly. Rows that the hook
        point does not hold are left out.

        Args:
            where: selects positions: a pandas query over the columns of `tokens()`, or a function of that frame.
            weight: `unique` gives every captured row once. `traffic` gives a row as often as its position occurred in
                traffic, reused occurrences included. A weights file of `sglang-probe coverage`, or a frame with
                columns rid, start, end and weight, gives a row as often as its weight says, on average, and leaves
                out what it does not name.
            intervened: take rows of positions under an intervention too (column `intervention` of `tokens()`). By
                default they are left out: they are not rows of the plain model.
        """
        return batches.iter_batches(
            self,
            hook_point,
            batch_size=batch_size,
            where=where,
            weight=weight,
            shuffle=shuffle,
            seed=seed,
            intervened=intervened,
        )
