"""Parts of a workload that are recorded, read and forgotten, and what is counted of them."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.experiment import record_job
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import job_of
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.run.hook_points import EMBED
from sglang_probe.sae.harvested import Harvested, harvested
from sglang_probe.sae.manifest import facts_of_run, model_of
from sglang_probe.studies.sae_train.config import SaeTrainConfig, Streamed
from sglang_probe.workload.request import Request

NOT_KEPT = "recorded and forgotten"


def harvest_of(config: SaeTrainConfig) -> Streamed:
    assert config.harvest is not None
    return config.harvest


def parts_of(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """The requests, so many at a time."""
    return [list(requests[i : i + size]) for i in range(0, len(requests), size)]


class Parts:
    """Records parts, and keeps count of what they were.

    Args:
        training: requests to train on, in parts.
        record: rows of requests, and, where they were recorded before, with which output tokens.
    """

    def __init__(
        self,
        training: Sequence[Sequence[Request]],
        record: Callable[[Sequence[Request], int], Harvested | None],
        status: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._training, self._record, self._status = training, record, status
        self.number = 0
        """Parts that were recorded."""
        self.rows = 0
        """Distinct rows to train on: those of the first pass over the workload."""
        self.served = 0
        """All rows to train on that were recorded; a workload that is served again counts again."""
        self.again = 0
        """Rows that were recorded again after an interruption; not counted otherwise."""
        self.counts = False
        """Whether what is recorded now counts; not while a fill is recorded again."""
        self._seen = 0
        """Parts of the first pass that were counted."""
        self._left_out = _left_out([])
        self._norm_limit = 0.0
        self._sum: Any = 0.0
        self._squares = 0.0

    def training(self, number: int) -> Harvested | None:
        """The rows of a part of the workload."""
        rows = self._served(self._training[number], "to train on")
        if not self.counts:
            self.again += 0 if rows is None else len(rows)
            return rows
        first, self._seen = number >= self._seen, max(self._seen, number + 1)
        if rows is not None:
            self.served += len(rows)
            if first:
                self._count(rows)
        return rows

    def held_out(self, requests: Sequence[Request], size: int) -> Iterator[Harvested]:
        """The rows of requests, so many requests at a time."""
        for some in parts_of(requests, size):
            if (rows := self._served(some, "to judge by")) is not None:
                yield rows

    def requests(self, parts: Iterable[int]) -> set[int]:
        """Numbers of the requests of some parts."""
        return {r.index for number in parts for r in self._training[number]}

    @property
    def variance(self) -> float:
        """Of all rows that were trained on."""
        return float(self._squares / self.rows - np.square(self._sum / self.rows).sum())

    @property
    def left_out(self) -> Harvested:
        """Without rows; counts and the largest limit of all parts."""
        return Harvested(torch.empty((0, 0)), pd.DataFrame(), self._left_out, self._norm_limit)

    def state(self) -> dict[str, Any]:
        """All counts, as plain data."""
        names = ("number", "rows", "served", "again", "_seen", "_norm_limit", "_squares")
        sums = np.asarray(self._sum).tolist()
        return {n: getattr(self, n) for n in names} | {"_sum": sums, "_left_out": self._left_out.to_dict("records")}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self._sum = np.asarray(self._sum)
        self._left_out = _left_out(state["_left_out"])

    def _served(self, requests: Sequence[Request], what: str) -> Harvested | None:
        self._status(f"recording part {self.number}, {len(requests)} requests {what}; {self.rows:,} rows so far")
        rows = self._record(requests, self.number)
        self._status("")
        self.number += 1
        return rows if rows is not None and len(rows) else None

    def _count(self, rows: Harvested) -> None:
        every = pd.concat([self._left_out, rows.left_out], ignore_index=True)
        self._left_out = every.groupby(["reason", "segment"], as_index=False, sort=True)["rows"].sum()
        self._norm_limit = max(self._norm_limit, rows.norm_limit)
        for batch in rows.batches():
            x = batch.double()
            self._sum = self._sum + x.sum(0).numpy()
            self._squares += float(x.square().sum())
            self.rows += len(x)


def _left_out(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(records, columns=["reason", "segment", "rows"]).astype({"rows": np.int64})


class Recorder:
    """Records requests into a folder that is deleted once their rows were read."""

    def __init__(self, config: SaeTrainConfig, prepared: Prepared, engines: EngineHost, scratch: Path) -> None:
        self._config, self._prepared, self._engines, self._scratch = config, prepared, engines, scratch
        self.model: dict[str, Any] = {}
        self.outputs: dict[int, list[int] | None] = {}
        """Output tokens of the requests that were recorded, by their number."""
        self.forced: Mapping[int, Sequence[int] | None] = {}
        """Output tokens of requests that are recorded again."""
        self.forces = False
        """Whether the engine is started so that it can force them: several ranks cannot."""
        self._facts: dict[str, Any] = {}
        self._manifests: list[str] = []
        self._counts = {name: Counter[str]() for name in ("positions_by_status", "positions_by_phase")}

    def __call__(self, requests: Sequence[Request], number: int) -> Harvested | None:
        """Rows of the requests; None if nothing was computed.

        Raises:
            ConfigError: they are of other weights than those of the parts before.
        """
        config, path = self._config, self._scratch / f"part-{number}"
        points = tuple(dict.fromkeys((EMBED, config.hook_point)))
        job = job_of(self._prepared, path.name, requests, arm=harvest_of(config).arm, hook_points=points)
        again = all(r.index in self.forced for r in requests)
        if again and self.forces:
            outputs = {r.index: self.forced[r.index] for r in requests}
            forced = {i: None if o is None else tuple(o) for i, o in outputs.items()}
            job = replace(job, forced=forced, forced_from=NOT_KEPT, asks=job.asks | {"force"})
        run = record_job(job, path, self._engines, asks=("force",) if self.forces else (), overwrite=True)
        try:
            model = model_of([run])
            self._refuse_other(model)
            served = run.requests()
            self.outputs |= {
                int(r.index): None if r.output_ids is None else [int(t) for t in r.output_ids]
                for r in served[["index", "output_ids"]].itertuples(index=False)
            }
            if not again:
                self._note(facts_of_run(run), model)
            if not run.row_count():
                return None
            how: dict[str, Any] = {"sinks": config.exclude.sinks(), "deduplicate": config.deduplicate}
            try:
                return harvested([run], config.hook_point, where=config.where, weight=config.weight, **how)
            except ConfigError:  # nothing of this part is left; were it so of all, the buffer would say so
                return None
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """What stands in a manifest in place of the runs."""
        counts = {name: dict(counted) for name, counted in self._counts.items()}
        digest = hashlib.sha256("".join(self._manifests).encode()).hexdigest()
        hashes = {"manifest_sha256": None, "manifests_of_parts_sha256": digest}
        return {**self._facts, **counts, **hashes, "rows_kept": False, "parts": len(self._manifests)}

    def forget_all_but(self, requests: set[int]) -> None:
        """Keep the output tokens of these requests, by their numbers."""
        self.outputs = {i: o for i, o in self.outputs.items() if i in requests}

    def state(self) -> dict[str, Any]:
        """All counts, as plain data."""
        counts = {name: dict(counted) for name, counted in self._counts.items()}
        return {"model": self.model, "facts": self._facts, "manifests": self._manifests, "counts": counts}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state`."""
        self.model, self._facts, self._manifests = state["model"], state["facts"], list(state["manifests"])
        self._counts = {name: Counter(counted) for name, counted in state["counts"].items()}

    def _refuse_other(self, model: Mapping[str, Any]) -> None:
        theirs, ours = self.model.get("weights_sha256"), model.get("weights_sha256")
        if theirs and ours and theirs != ours:
            raise ConfigError(
                f"the weights of `{model.get('name')}` are others than when the training began",
                fix="put the files of the model back and use --resume, or train anew with --overwrite",
            )

    def _note(self, facts: Mapping[str, Any], model: dict[str, Any]) -> None:
        self.model = self.model or model
        self._manifests.append(str(facts["manifest_sha256"]))
        self._facts = {n: facts[n] for n in ("policy", "dtype")} | {"name": NOT_KEPT}
        for name, counted in self._counts.items():
            counted.update(facts[name] or {})
