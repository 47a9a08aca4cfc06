"""Captured rows against `transformers` on the same tokens, in the same dtype: is it the model's residual stream?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sglang_probe.capture.hook_points import parse_hook_point
from sglang_probe.ledger.check import Check
from sglang_probe.ledger.run import Run
from sglang_probe.study.drift import row_distance

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted relative error of a row, by dtype. In half precision it bounds rounding through all layers."""


def reference_errors(run: Run, model_path: str, *, requests: int) -> dict[str, np.ndarray]:
    """Relative L2 error of each captured row of the first `requests` requests, per hook point.

    Each request's prompt and output are run through the `transformers` model at once, without a cache.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    hook_points = run.hook_points
    dtype = run.rows(hook_points[0], [0]).dtype
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    outputs: dict[str, torch.Tensor] = {}
    # Hooks, not `output_hidden_states`: its last entry is behind the final norm.
    handles = []
    for name in hook_points:
        layer = parse_hook_point(name).layer
        module = model.model.embed_tokens if layer is None else model.model.layers[layer]

        def keep(_module: object, _args: object, output: Any, name: str = name) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).squeeze(0)

        handles.append(module.register_forward_hook(keep))
    errors: dict[str, list[np.ndarray]] = {h: [] for h in hook_points}
    tokens = run.tokens()
    tokens = tokens[tokens["row"] >= 0]
    try:
        for r in run.requests().head(requests).itertuples():
            mine = tokens[tokens["rid"] == r.rid]
            ids = [*r.prompt_ids, *r.output_ids]
            with torch.no_grad():
                model(torch.tensor([ids]))
            for name in hook_points:
                expected = outputs[name][torch.tensor(mine["position"].tolist())]
                errors[name].append(row_distance(run.rows(name, mine["row"].to_numpy()), expected)[0])
    finally:
        for handle in handles:
            handle.remove()
    return {h: np.concatenate(e) for h, e in errors.items()}


def check_against_transformers(run: Run, model_path: str, *, requests: int) -> Check:
    """The comparison as a check: the worst row stays within `TOLERANCE` of its dtype."""
    errors = reference_errors(run, model_path, requests=requests)
    dtype = run.rows(run.hook_points[0], [0]).dtype
    worst_hook = max(errors, key=lambda h: float(errors[h].max()))
    worst = float(errors[worst_hook].max())
    covered = sum(len(e) for e in errors.values())
    summary = ", ".join(f"{h}: median {np.median(e):.1e}, max {e.max():.1e}" for h, e in errors.items())
    limit = TOLERANCE[dtype]
    return Check(
        "reference",
        f"rows agree with transformers in {str(dtype).removeprefix('torch.')} (relative error below {limit:g})",
        covered,
        "rows",
        None if worst < limit else f"{worst_hook}: relative error {worst:.2e}",
        note=summary,
    )
