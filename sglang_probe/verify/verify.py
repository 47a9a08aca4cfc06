"""The invariants of a run directory, checked without SGLang.

Each check is a function of a `Run` that returns the first violation in words, or None; one file a family. What a check
covered is counted, because a check of nothing proves nothing. A check that meets something unreadable is a violation
of it, never a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sglang_probe.errors import ProbeError
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.hook_points import EMBED, score_points
from sglang_probe.run.run import Run
from sglang_probe.verify.budget import budget_holds, has_budget
from sglang_probe.verify.causes import causes_add_up, has_causes
from sglang_probe.verify.check import Check
from sglang_probe.verify.files import Progress, files_intact, nothing
from sglang_probe.verify.forwards import forwards_add_up
from sglang_probe.verify.frames import ReadOnce
from sglang_probe.verify.gates import gates_decided, has_gates
from sglang_probe.verify.interventions import has_interventions, marked_as_planned
from sglang_probe.verify.kept import has_kept_sets, kept_sets_stay_private
from sglang_probe.verify.manifest import manifest_fits
from sglang_probe.verify.origins import origins_hold, rebinds_hold
from sglang_probe.verify.phases import phases_fit
from sglang_probe.verify.requests import requests_are_the_engines, reuse_reconciles
from sglang_probe.verify.rows import rows_are_possible, rows_owned_once
from sglang_probe.verify.scores import scores_are_of_their_rows
from sglang_probe.verify.selected import held_as_selected
from sglang_probe.verify.spans import attempts_follow, spans_tile
from sglang_probe.verify.tables import cells_are_possible
from sglang_probe.verify.telemetry import telemetry_holds
from sglang_probe.verify.tree import has_tree, tree_fits
from sglang_probe.verify.withheld import has_withheld, nothing_withheld_is_there

if TYPE_CHECKING:
    import torch

Asked = Callable[[Run], Check]

LEDGER: dict[str, Asked] = {
    "requests": requests_are_the_engines,
    "tiling": spans_tile,
    "attempts": attempts_follow,
    "phases": phases_fit,
    "reuse": reuse_reconciles,
    "forwards": forwards_add_up,
    "lineage": origins_hold,
    "rebinds": rebinds_hold,
    "manifest": manifest_fits,
    "row ownership": rows_owned_once,
}
"""What is asked of the tables, once they can be read."""


def verify(run: Run, *, embedding: torch.Tensor | None = None, progress: Progress = nothing) -> list[Check]:
    """Check every invariant; `embedding` as in `sglang_probe.verify.ownership.rows_match_tokens`.

    Checks that could only repeat what is wrong are left out: those of the tables where a file was changed or a cell
    cannot be, and those of the content of rows that have no one owner.

    Args:
        progress: told what is being read.
    """
    from sglang_probe.verify.ownership import rows_match_tokens

    run = ReadOnce(run)
    results: list[Check] = []

    def holds(name: str, check: Asked) -> bool:
        progress(name, 0, 1)
        results.append(_asked(name, check, run))
        return results[-1].holds

    if not holds("files", partial(files_intact, progress=progress)) or not holds("cells", cells_are_possible):
        return results
    if not (run.path / REQUESTS_FILE).is_file():
        holds("requests", requests_are_the_engines)
        return results
    checks = dict(LEDGER)
    if _true(has_tree, run):
        checks["tree"] = tree_fits
    if _true(has_causes, run):
        checks["causes"] = causes_add_up
    if _true(has_kept_sets, run):
        checks["kept sets"] = kept_sets_stay_private
    if _true(has_interventions, run):
        checks["interventions"] = marked_as_planned
    if _true(has_gates, run):
        checks["gates"] = gates_decided
    if _true(has_budget, run):
        checks["budget"] = budget_holds
    if _true(has_withheld, run):
        checks["withheld"] = nothing_withheld_is_there
    if run.manifest.get("telemetry"):
        checks["telemetry"] = telemetry_holds
    owned = checks.pop("row ownership")
    for name, check in checks.items():
        holds(name, check)
    # Content is asked only of rows that have one owner, and of a run that has any.
    if not (holds("row ownership", owned) and results[-1].covered):
        return results
    if run.selected.partial:
        holds("selection", held_as_selected)
    owners = EMBED in run.hook_points and holds("content", partial(rows_match_tokens, embedding=embedding))
    holds("rows", partial(rows_are_possible, proved=owners, progress=progress))
    if score_points(run.hook_points):
        holds("scores", scores_are_of_their_rows)
    return results


def _asked(name: str, check: Asked, run: Run) -> Check:
    function = check.func if isinstance(check, partial) else check
    claim = (function.__doc__ or name).strip().split("\n")[0]
    try:
        return check(run)
    except ProbeError as e:
        return Check(name, claim, 0, "files", e.message)
    except Exception as e:  # a run that was tampered with may hold anything
        why = f"it could not be asked ({type(e).__name__}: {e}): the run holds something that no run does"
        return Check(name, claim, 0, "files", why)


def _true(question: Callable[[Run], bool], run: Run) -> bool:
    try:
        return question(run)
    except ProbeError:
        return False
    except Exception:  # the check itself says what the run holds that no run does
        return True
