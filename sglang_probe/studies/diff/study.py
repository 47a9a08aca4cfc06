"""Two groups of texts of a run, and the features that differ between them."""

from __future__ import annotations

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
from sglang_probe.sae.coded_run import Coded, code_run
from sglang_probe.sae.differential import PERMUTATIONS, Found, compare, units_of
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.manifest import refuse_other_model
from sglang_probe.studies.base import Measured
from sglang_probe.studies.lens.study import checkpoint_of

Array = np.ndarray[Any, Any]
FAMILY = "family"


@dataclass(frozen=True)
class DiffResult(Measured):
    """What differs."""

    sae: str
    weights: str
    hook_point: str
    run: str
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
    latents: pd.DataFrame
    """`found.frame` with a heuristic `label`."""
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
            "run": self.run,
            "by": self.by,
            "groups": {"a": self.a, "b": self.b},
            "unit": self.unit,
            "paired": self.paired,
            "units": list(self.units),
            "rows": list(self.rows),
            "false_discovery_rate": self.q,
            "tested": f.tested,
            "discovered": f.discovered,
            "confirmed": f.confirmed,
            "beyond_tokens": int(self.latents["beyond_tokens"].sum()),
            "discovered_with_groups_exchanged": f.null_discovered,
            "confirmed_with_groups_exchanged": f.null_confirmed,
            "shortlist": self.shortlist.head(50).to_dict("records"),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All tested latents, and the shortlist."""
        return {"latents": self.latents, "shortlist": self.shortlist}


def diff(
    folder: Path,
    path: Path,
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
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> DiffResult:
    """Compare two groups of texts.

    Args:
        by: `segment`, `family`, or an axis that the workload labelled.
        a, b: patterns of the names of either group, as file names (`code/*`).

    Raises:
        ConfigError: no such groups, or too few texts; the SAE or checkpoint is of other weights than the run.
        RunDirectoryError: the run cannot be read, or lacks the hook point.
    """
    run, sae = load_run(path), read_sae(folder, hook_point=hook_point)
    refuse_other_model(sae, [run], str(folder))
    vocabulary = Vocabulary.load(checkpoint_of(run, model))
    coded = code_run(run, sae, where=where, sinks=sinks, most=most, seed=seed, tell=tell)
    group = groups(run, coded, by, a, b)
    # Texts that share a prefix or a document are no two observations; where families are what is compared, texts are.
    unit = "rid" if by == FAMILY else FAMILY
    tokens = coded.rows["token_id"].to_numpy()
    units = units_of(coded.codes, tokens, coded.rows[unit].to_numpy(), group)
    found = compare(units, q=q, permutations=permutations, seed=seed)
    fires = coded.codes.copy()
    fires.data = np.ones_like(fires.data)
    rules = labels.token_rules(fires, tokens)
    names = [
        labels.name_of([visible(vocabulary.text(t)) for t in rules.tokens[m]], float(np.nan_to_num(rules.f1[m])), [])
        for m in found.frame["latent"]
    ]
    notes = []
    if units.left_out:
        kind = "one group only, and are left out of the pairs" if units.paired else "both groups, and are left out"
        notes.append(f"{units.left_out} texts have rows of {kind}")
    if found.null_discovered and np.mean(found.null_confirmed) > 0.5:
        notes.append("exchanged groups are confirmed too: do not use these verdicts")
    sizes = (len(units.names),) * 2 if units.paired else tuple(int((units.group == g).sum()) for g in (0, 1))
    return DiffResult(
        folder.name,
        weights_sha256(folder),
        str(sae.hook_point),
        run.path.name,
        by,
        a,
        b,
        "text" if unit == "rid" else "family of texts",
        units.paired,
        (sizes[0], sizes[1]),
        (int((group == 0).sum()), int((group == 1).sum())),
        q,
        found,
        found.frame.assign(label=names),
        notes,
    )


def groups(run: Run, coded: Coded, by: str, a: str, b: str) -> Array:
    """Group of each row: 0 (A), 1 (B) or -1, int64 `[N]`.

    Raises:
        ConfigError: no such axis; a pattern names nothing, or both name the same.
    """
    if by == "segment":
        names = coded.rows["segment"].astype(str).to_numpy()
    elif by == FAMILY:
        names = coded.rows["family"].astype(str).to_numpy()
    else:
        names = _labelled(run, coded, by)
    known = sorted(set(names.tolist()))
    hits = [{n for n in known if fnmatchcase(n, pattern)} for pattern in (a, b)]
    for pattern, hit in zip((a, b), hits, strict=True):
        if not hit:
            shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
            raise ConfigError(f"no {by} of {run.path} is called `{pattern}`", fix=f"there is {shown}")
    if both := sorted(hits[0] & hits[1]):
        raise ConfigError(f"`{a}` and `{b}` both name {by} `{both[0]}`", fix="give patterns that share no name")
    return np.where(np.isin(names, list(hits[0])), 0, np.where(np.isin(names, list(hits[1])), 1, -1))


def _labelled(run: Run, coded: Coded, axis: str) -> Array:
    """Label of each row along an axis of the workload's own; empty where there is none."""
    requests = run.requests().set_index("rid")
    held = requests["labels"] if "labels" in requests else pd.Series(dtype=object)
    axes = sorted({s["axis"] for spans in held if spans is not None for s in spans})
    if axis not in axes:
        has = ", ".join(["segment", FAMILY, *axes])
        raise ConfigError(f"{run.path} has no labels along `{axis}`", fix=f"`--by` is one of {has}")
    names = np.full(len(coded), "", dtype=object)
    position = coded.rows["position"].to_numpy()
    for rid, at in coded.rows.groupby("rid").indices.items():
        spans = held.get(rid)
        for s in spans if spans is not None else ():
            if s["axis"] == axis:
                names[at[(position[at] >= s["start"]) & (position[at] < s["end"])]] = s["name"]
    return names.astype(str)
