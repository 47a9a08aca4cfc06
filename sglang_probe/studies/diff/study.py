"""Two groups of texts of some runs, and the features that differ between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError
from sglang_probe.report.figures import visible
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae import labels
from sglang_probe.sae.coded_run import Coded, code_runs, run_names
from sglang_probe.sae.differential import (
    PERMUTATIONS,
    FalseDiscoveries,
    Found,
    compare,
    false_discoveries,
    units_of,
)
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.manifest import refuse_other_model
from sglang_probe.studies.base import Measured
from sglang_probe.studies.lens.study import checkpoint_of

Array = np.ndarray[Any, Any]
FAMILY, RUN = "family", "run"
SPLITS = 20
"""Of each group into random halves."""


@dataclass(frozen=True)
class DiffResult(Measured):
    """What differs."""

    sae: str
    weights: str
    hook_point: str
    runs: list[str]
    by: str
    a: str
    b: str
    unit: str
    paired: bool
    units: tuple[int, int]
    """Of A and B; twice the same number in paired designs."""
    rows: tuple[int, int]
    q: float
    found: Found
    halves: list[FalseDiscoveries]
    """Random halves of either group; empty where it was not asked for, or the groups are too small."""
    latents: pd.DataFrame
    """`found.frame` with a heuristic `label`."""
    seconds: float
    """That encoding took."""
    notes: Sequence[str]

    @property
    def shortlist(self) -> pd.DataFrame:
        """Confirmed latents, those that differ beyond their tokens first, then by standardised difference: what is
        worth an intervention."""
        some = self.latents[self.latents["confirmed"]]
        order = some["standardised"].abs().fillna(0)
        return (
            some.assign(_order=order).sort_values(["beyond_tokens", "_order"], ascending=False).drop(columns="_order")
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        f = self.found
        return {
            "sae": self.sae,
            "weights_sha256": self.weights,
            "hook_point": self.hook_point,
            "runs": self.runs,
            "by": self.by,
            "groups": {"a": self.a, "b": self.b},
            "unit": self.unit,
            "paired": self.paired,
            "units": list(self.units),
            "rows": list(self.rows),
            "false_discovery_rate": self.q,
            "tested": f.tested,
            "discoverable_together": f.together,
            "discovered": f.discovered,
            "confirmed": f.confirmed,
            "beyond_tokens": int(self.latents["beyond_tokens"].sum()),
            "discovered_with_groups_exchanged": f.null_discovered,
            "confirmed_with_groups_exchanged": f.null_confirmed,
            "random_halves": [
                {
                    "group": (self.a, self.b)[h.group],
                    "units": h.units,
                    "discovered": h.discovered,
                    "confirmed": h.confirmed,
                }
                for h in self.halves
            ],
            "coding_seconds": round(self.seconds, 2),
            "shortlist": self.shortlist.head(50).to_dict("records"),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All tested latents, and the shortlist."""
        return {"latents": self.latents, "shortlist": self.shortlist}


def diff(
    folder: Path,
    paths: Path | Sequence[Path],
    *,
    by: str,
    a: str,
    b: str,
    hook_point: str | None = None,
    model: Path | None = None,
    where: str | None = None,
    sinks: Sinks | None = None,
    most: int = 200_000,
    q: float = 0.05,
    permutations: int = PERMUTATIONS,
    splits: int = SPLITS,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> DiffResult:
    """Compare two groups of texts.

    Args:
        by: `segment`, `family`, `run`, or an axis that the workload labelled.
        a, b: patterns of the names of either group, as file names (`code/*`).
        splits: of each group into random halves, in which nothing differs; 0: none.

    Raises:
        ConfigError: no such groups, or too few texts; the SAE or checkpoint is of other weights than a run.
        RunDirectoryError: a run cannot be read, or lacks the hook point.
    """
    runs = [load_run(p) for p in ([paths] if isinstance(paths, Path) else paths)]
    sae = read_sae(folder, hook_point=hook_point)
    for run in runs:
        refuse_other_model(sae, [run], str(folder))
    vocabulary = Vocabulary.load(checkpoint_of(runs[0], model))
    began = time.monotonic()
    coded = code_runs(runs, sae, where=where, sinks=sinks, most=most, seed=seed, tell=tell)
    seconds = time.monotonic() - began
    group = groups(runs, coded, by, a, b)
    # Texts that share a prefix or a document are no two observations; where families are what is compared, texts are.
    unit = "rid" if by == FAMILY else FAMILY
    of = (coded.rows["run"] + ": " + coded.rows["rid"] if by == FAMILY else coded.rows[FAMILY]).to_numpy()
    tokens = coded.rows["token_id"].to_numpy()
    units = units_of(coded.codes, tokens, of, group)
    found = compare(units, q=q, permutations=permutations, seed=seed)
    how = {"splits": splits, "q": q, "permutations": permutations, "seed": seed}
    halves = false_discoveries(coded.codes, tokens, of, group, **how) if splits else []  # type: ignore[arg-type]
    rules = labels.token_rules(labels.fired(coded.codes), tokens)
    names = [
        labels.name_of([visible(vocabulary.text(t)) for t in rules.tokens[m]], float(np.nan_to_num(rules.f1[m])), [])
        for m in found.frame["latent"]
    ]
    notes = []
    if units.left_out:
        kind = "one group only, and are left out of the pairs" if units.paired else "both groups, and are left out"
        notes.append(f"{units.left_out} texts have rows of {kind}")
    if found.together >= 5:
        notes.append(
            f"with {len(units.names)} units and {permutations:,} permutations a latent is discovered only where "
            f"{found.together} of {found.tested:,} differ as clearly as can be: that none is found says little. More "
            f"texts or --permutations {int(np.ceil(found.tested / q)):,} help"
        )
    if found.null_discovered and np.mean(found.null_confirmed) > 0.5:
        notes.append("exchanged groups are confirmed too: do not use these verdicts")
    false = [(a, b)[h.group] for h in halves if np.mean(np.array(h.confirmed) > 0) > 0.1]
    notes += [f"random halves of `{name}` are confirmed to differ too: do not use these verdicts" for name in false]
    sizes = (len(units.names),) * 2 if units.paired else tuple(int((units.group == g).sum()) for g in (0, 1))
    return DiffResult(
        folder.name,
        weights_sha256(folder),
        str(sae.hook_point),
        coded.runs,
        by,
        a,
        b,
        "text" if unit == "rid" else "family of texts",
        units.paired,
        (sizes[0], sizes[1]),
        (int((group == 0).sum()), int((group == 1).sum())),
        q,
        found,
        halves,
        found.frame.assign(label=names),
        seconds,
        notes,
    )


def groups(runs: Sequence[Run], coded: Coded, by: str, a: str, b: str) -> Array:
    """Group of each row: 0 (A), 1 (B) or -1, int64 `[N]`.

    Raises:
        ConfigError: no such axis; a pattern names nothing, or both name the same.
    """
    names = coded.rows[by].astype(str).to_numpy() if by in ("segment", FAMILY, RUN) else _labelled(runs, coded, by)
    known = sorted(set(names.tolist()))
    hits = [{n for n in known if fnmatchcase(n, pattern)} for pattern in (a, b)]
    for pattern, hit in zip((a, b), hits, strict=True):
        if not hit:
            shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
            where = runs[0].path if len(runs) == 1 else "these runs"
            raise ConfigError(f"no {by} of {where} is called `{pattern}`", fix=f"there is {shown}")
    if both := sorted(hits[0] & hits[1]):
        raise ConfigError(f"`{a}` and `{b}` both name {by} `{both[0]}`", fix="give patterns that share no name")
    return np.where(np.isin(names, list(hits[0])), 0, np.where(np.isin(names, list(hits[1])), 1, -1))


def _labelled(runs: Sequence[Run], coded: Coded, axis: str) -> Array:
    """Label of each row along an axis of the workload's own; empty where there is none."""
    names = np.full(len(coded), "", dtype=object)
    position = coded.rows["position"].to_numpy()
    indices = coded.rows.groupby(["run", "rid"]).indices
    axes: set[str] = set()
    for run, name in zip(runs, run_names([r.path for r in runs]), strict=True):
        requests = run.requests().set_index("rid")
        held = requests["labels"] if "labels" in requests else pd.Series(dtype=object)
        for rid, spans in held.items():
            for s in spans if spans is not None else ():
                axes.add(s["axis"])
                at = indices.get((name, rid)) if s["axis"] == axis else None
                if at is not None:
                    names[at[(position[at] >= s["start"]) & (position[at] < s["end"])]] = s["name"]
    if axis not in axes:
        has = ", ".join(["segment", FAMILY, RUN, *sorted(axes)])
        where = runs[0].path if len(runs) == 1 else "these runs"
        raise ConfigError(f"{where} has no labels along `{axis}`", fix=f"`--by` is one of {has}")
    return names.astype(str)
