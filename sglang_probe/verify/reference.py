"""Captured rows against `transformers` on the same tokens, in the same dtype: are they the model's?"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe import bf16
from sglang_probe.ask import recorded_override
from sglang_probe.errors import UnsupportedError
from sglang_probe.run.hook_points import (
    KEY,
    QUERY,
    ROTATED_KEY,
    ROTATED_QUERY,
    VALUE,
    HookPoint,
    parse_hook_point,
    score_points,
)
from sglang_probe.run.run import Run
from sglang_probe.run.scores import columns_of, read_weights
from sglang_probe.stats.distance import row_distance
from sglang_probe.steering.library import Vector
from sglang_probe.steering.reference import Close, Vectors, intervened
from sglang_probe.steering.spec import Spec
from sglang_probe.verify import rounding
from sglang_probe.verify.check import Check
from sglang_probe.verify.segment import known_weights
from sglang_probe.verify.withheld import NEIGHBOUR

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted relative error of a row after up to four layers, by dtype. `tolerance` has deeper ones."""

UNDETERMINED = 0.05
"""Largest accepted share of a hook point's rows that rounding decides: a check that says nothing of more has failed."""
EXCUSED = 8.0
"""How much further than by rounding alone a row may be off and still be one that rounding decides."""

_ATTENTION = "sglang_probe"
_ROTATED = (ROTATED_QUERY, ROTATED_KEY)


@dataclass
class Errors:
    """Relative L2 error of each captured row, per hook point, and what was left out."""

    by_hook_point: dict[str, np.ndarray]
    intervened: int = 0
    """Requests that were computed again under their interventions."""
    unknown: list[str] = field(default_factory=list)
    """Requests that were left out because a vector of their interventions is not known."""
    undecided: int = 0
    """Positions that were left out because rounding decides whether a feature is active, there or before them."""
    undetermined: dict[str, int] = field(default_factory=dict)
    """By hook point: rows that were left out because rounding alone moves the model's own row as far
    (`verify/rounding.py`)."""


def reference_errors(
    run: Run, model_path: str, *, requests: int, vectors: Sequence[Vector] = ()
) -> dict[str, np.ndarray]:
    """Relative L2 error of each captured row per hook point: of `compare`."""
    return compare(run, model_path, requests=requests, vectors=vectors).by_hook_point


def compare(run: Run, model_path: str, *, requests: int, vectors: Sequence[Vector] = ()) -> Errors:
    """Compare captured rows with `transformers`: those of the first `requests` requests, half of which are ones under
    interventions if there are such.

    Each request's prompt and output are run through the `transformers` model at once, without a cache, under the
    request's interventions.

    Args:
        vectors: those that interventions may need. Requests that need others are left out.

    Raises:
        UnsupportedError: `transformers` is not installed, or has the model's layers under other names.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as e:
        raise UnsupportedError(
            f"rows cannot be compared with `transformers`: {e}", fix="pip install transformers, or ask without"
        ) from e

    disable_progress_bar()
    weights = {h: w for h in score_points(run.hook_points) if (w := _score_weights(run, h)) is not None}
    hook_points = [h for h in run.hook_points if h in weights or h not in score_points(run.hook_points)]
    dtype = run.rows_dtype() or _served_dtype(run)
    _register_attention()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation=_ATTENTION).eval()
    rounding.blocks(model)
    bf16.widen(model)
    errors: dict[str, list[np.ndarray]] = {h: [] for h in hook_points}
    tokens = run.tokens()
    tokens = tokens[tokens["row"] >= 0]
    asked = run.requests()
    if (known := known_weights(run)) is not None:
        later = tokens.loc[~np.isin(tokens["forward_id"].to_numpy(np.int64), known), "rid"]
        asked = asked[~asked["rid"].isin(set(later))]
    if run.manifest.get("withheld"):  # of which token ids are not there, nothing can be computed again
        away = run.withheld()
        asked = asked[~asked["rid"].isin(set(away.loc[away["reason"] != NEIGHBOUR, "rid"]))]
    specs = carried_out(run)
    usable = Vectors.of(vectors)
    found = Errors({})
    found.unknown = [r for r, s in specs.items() if usable is None or usable.lacks(s) is not None]
    asked = _first(asked[~asked["rid"].isin(found.unknown)], set(specs), requests)
    for r in asked.itertuples():
        mine = tokens[tokens["rid"] == r.rid]
        ids = [*r.prompt_ids, *r.output_ids]
        spec = specs.get(r.rid)
        close = Close(lambda layer: tolerance(f"blocks.{layer}.hook_resid_post", dtype or torch.float32))
        under: Any = nullcontext()
        if spec is not None and usable is not None:
            under = intervened(model, spec, len(r.prompt_ids), usable, close=close)
            found.intervened += 1
        with under, _recorded(model, hook_points) as outputs, torch.no_grad():
            model(torch.tensor([ids]), **_moved(r.sampling_params, len(ids)))
        if close.first is not None:
            found.undecided += int((mine["position"] >= close.first).sum())
            mine = mine[mine["position"] < close.first]
        far: dict[str, np.ndarray] = {}
        for name in hook_points:
            held = mine[run.holds(name, mine["row"].to_numpy())]
            x_ND = outputs[name][torch.tensor(held["position"].tolist(), dtype=torch.int64)]
            given = run.rows(name, held["row"].to_numpy())
            if name in weights:
                errors[name].append(_score_errors(given, x_ND, weights[name]))
                continue
            errors[name].append(row_distance(given, _heads(run, name, x_ND))[0])
            if (errors[name][-1] >= tolerance(name, dtype or torch.float32)).any():
                far[name] = held["position"].to_numpy(np.int64)
        if far and spec is None:
            moved = rounding.spread(model, functools.partial(_rows_of, model, list(far), ids, r.sampling_params))
            for name, positions in far.items():
                limit = tolerance(name, dtype or torch.float32)
                error, alone = errors[name][-1], moved[name][positions]
                unknown = (error >= limit) & (alone >= limit / 2) & (error <= EXCUSED * alone)
                found.undetermined[name] = found.undetermined.get(name, 0) + int(unknown.sum())
                errors[name][-1] = error[~unknown]
    found.by_hook_point = {h: np.concatenate(e) if e else np.empty(0) for h, e in errors.items()}
    return found


def _rows_of(model: Any, hook_points: list[str], ids: list[int], sampling_params: str) -> dict[str, torch.Tensor]:
    with _recorded(model, hook_points) as outputs, torch.no_grad():
        model(torch.tensor([ids]), **_moved(sampling_params, len(ids)))
    return outputs


def carried_out(run: Run) -> dict[str, Spec]:
    """What was done to each request that ran under interventions: of a gated one, what its recorded decision left."""
    opened = dict(zip((gates := run.gates())["rid"], gates["opened"], strict=True))
    found = {}
    for r in run.interventions().itertuples():
        spec = Spec.from_json(json.loads(r.spec)).decided(bool(opened.get(r.rid, False)))
        if spec is not None:
            found[r.rid] = spec
    return found


def _first(asked: pd.DataFrame, intervened: set[str], requests: int) -> pd.DataFrame:
    """The first `requests` requests; every other one is under interventions while there are such, in their order."""
    under = asked["rid"].isin(intervened).to_numpy()
    turn = np.where(under, 2 * np.cumsum(under) - 2, 2 * np.cumsum(~under) - 1)
    return asked.iloc[np.argsort(turn, kind="stable")[:requests]]


def _moved(sampling_params: str, length: int) -> dict[str, torch.Tensor]:
    """Positions of a request that prescribed them, and a mask: without one `transformers` takes positions that do not
    ascend for several packed sequences, which do not see each other."""
    override = recorded_override(sampling_params)
    if override is None:
        return {}
    before, to = override.moved(0, length)
    positions = torch.tensor([*range(before), *to])
    return {"position_ids": positions[None], "attention_mask": torch.ones(1, length, dtype=torch.int64)}


def check_against_transformers(run: Run, model_path: str, *, requests: int, vectors: Sequence[Vector] = ()) -> Check:
    """The comparison as a check: every row stays within the `tolerance` of its hook point, but for a share of
    `UNDETERMINED` of each hook point's at most, of which rounding decides.

    Raises:
        UnsupportedError: of `compare`.
    """
    found = compare(run, model_path, requests=requests, vectors=vectors)
    errors = {h: e for h, e in found.by_hook_point.items() if len(e)}
    dtype = run.rows_dtype() or _served_dtype(run) or torch.float32
    notes = _notes(run, found)
    undecided = _undetermined(found)
    if not errors and undecided is None:
        return Check("reference", "rows agree with transformers", 0, "rows", None, "; ".join(notes) or None)
    claim = f"rows agree with transformers in {str(dtype).removeprefix('torch.')}"
    if not errors:
        return Check("reference", claim, 0, "rows", undecided, "; ".join(notes))
    limits = {h: tolerance(h, dtype) for h in errors}
    worst_hook = max(errors, key=lambda h: float(errors[h].max()) / limits[h])
    worst, limit = float(errors[worst_hook].max()), limits[worst_hook]
    covered = sum(len(e) for e in errors.values())
    summary = ", ".join(f"{h}: median {np.median(e):.1e}, max {e.max():.1e}" for h, e in errors.items())
    return Check(
        "reference",
        f"{claim} (relative error below {_span(limits.values())})",
        covered,
        "rows",
        undecided if worst < limit else f"{worst_hook}: relative error {worst:.2e}, not below {limit:.2g}",
        note="; ".join([summary, *notes]),
    )


def _undetermined(found: Errors) -> str | None:
    """The hook point of which rounding decides the largest share of rows, if that is more than `UNDETERMINED`."""
    shares = {h: n / (n + len(found.by_hook_point[h])) for h, n in found.undetermined.items() if n}
    worst = max(shares, key=lambda h: shares[h], default=None)
    if worst is None or shares[worst] <= UNDETERMINED:
        return None
    n = found.undetermined[worst]
    return (
        f"{worst}: {n} of {n + len(found.by_hook_point[worst])} rows are too far off, and rounding alone may do that, "
        f"so that nothing is shown of them; {UNDETERMINED:.0%} at most may be so (compare more requests, or in float32)"
    )


def _notes(run: Run, found: Errors) -> list[str]:
    """What was compared and what was not."""
    notes = []
    if known_weights(run) is not None:
        notes.append("requests after an update of the weights were not compared")
    if run.manifest.get("withheld"):
        notes.append("requests of which token ids are withheld were not compared")
    if found.intervened:
        notes.append(f"{found.intervened} requests were computed again under their interventions")
    if found.unknown:
        notes.append(
            f"{len(found.unknown)} requests under interventions were not compared ({found.unknown[0]} first): give the "
            "library of their vectors as it was (`--library`)"
        )
    if found.undecided:
        notes.append(
            f"{found.undecided} positions were left out, because a feature was so near its threshold that rounding "
            "decides"
        )
    if undetermined := sum(found.undetermined.values()):
        notes.append(
            f"{undetermined} rows were left out: rounding every layer's output otherwise moves the model's own "
            "row by more than half of what is accepted"
        )
    return notes


def tolerance(hook_point: str, dtype: torch.dtype) -> float:
    """Largest accepted relative error of a row of a hook point.

    Every layer adds rounding of its own to the residual stream, in a direction of its own, so that what two correct
    computations differ by grows like the square root of the depth: in SmolLM2-135M in bf16 the median is 0.0045, 0.010,
    0.014 and 0.017 after layers 0, 10, 20 and 29, and the largest of 2,299 rows 0.014, 0.032, 0.040 and 0.059. A row
    that belongs to another token differs by about 1.
    """
    layer = parse_hook_point(hook_point).layer
    return TOLERANCE[dtype] * max(1.0, ((layer or 0) + 1) / 4) ** 0.5


def _span(limits: Iterable[float]) -> str:
    low, high = min(numbers := list(limits)), max(numbers)
    return f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}, by depth"


def _score_weights(run: Run, hook_point: str) -> torch.Tensor | None:
    """Vectors of a hook point's scores, `[d, k]`; None: they are not with the run."""
    weights = read_weights(run)
    return None if weights is None else torch.stack([weights[n] for n in columns_of(run, hook_point)], dim=1)


def _score_errors(given_NK: torch.Tensor, x_ND: torch.Tensor, w_DK: torch.Tensor) -> np.ndarray:
    """Largest error of a row's scores, in units of the lengths of row and vector: a score near 0 is a difference of
    large numbers, whose relative error says nothing."""
    x, w = x_ND.double(), w_DK.double()
    error_NK = (given_NK.double() - x @ w).abs() / (x.norm(dim=1)[:, None] * w.norm(dim=0))
    return np.asarray(error_NK.amax(dim=1).numpy())


def _served_dtype(run: Run) -> torch.dtype | None:
    """The model's dtype by the manifest, of a run without rows."""
    told = str((run.manifest.get("server_resolved") or {}).get("dtype", "")).removeprefix("torch.")
    return {str(d).removeprefix("torch."): d for d in TOLERANCE}.get(told)


def _heads(run: Run, hook_point: str, x_NW: torch.Tensor) -> torch.Tensor:
    """The columns of the heads that the run holds."""
    if hook_point not in run.manifest.get("head_numbers", {}):
        return x_NW
    _, head_dim = run.heads(hook_point)
    return torch.unflatten(x_NW, 1, (-1, head_dim))[:, run.head_numbers(hook_point)].flatten(1)


@contextmanager
def _recorded(model: Any, hook_points: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """A dictionary that holds `[positions, width]` of each hook point after every forward of `model`.

    Pre-RoPE rows and values are outputs of the projections or of q/k norm, post-RoPE rows what attention is given: all
    taken outside the rotation.
    """
    outputs: dict[str, torch.Tensor] = {}
    handles = []
    for point in map(parse_hook_point, hook_points):
        if point.site in _ROTATED:
            core = model.model.layers[point.layer].self_attn
            core.probe_sink = {**getattr(core, "probe_sink", {}), _ROTATED.index(point.site): (point.name, outputs)}
            continue

        def note(_module: object, _args: object, output: Any, name: str = point.name) -> None:
            x = (output[0] if isinstance(output, tuple) else output).squeeze(0)
            outputs[name] = x.flatten(1)

        handles.append(_module(model.model, point).register_forward_hook(note))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _module(model: Any, point: HookPoint) -> Any:
    # Hooks, not `output_hidden_states`: its last entry is after the final norm.
    if point.layer is None:
        return model.embed_tokens
    layer = model.layers[point.layer]
    if not point.in_attention:
        return layer
    attention = layer.self_attn
    name = {QUERY: "q", KEY: "k", VALUE: "v"}[point.site]
    return getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")


def _register_attention() -> None:
    """Make SDPA known under a name of its own that also passes on its queries and keys."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        for which, (name, outputs) in getattr(module, "probe_sink", {}).items():
            x_BHND = args[which]
            outputs[name] = x_BHND[0].transpose(0, 1).flatten(1)
        q, k, v, *others = args
        if q.dtype == torch.bfloat16 and bf16.products() == "fp32":
            out, weights = sdpa_attention_forward(module, q.float(), k.float(), v.float(), *others, **kwargs)
            return out.to(q.dtype), weights
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
