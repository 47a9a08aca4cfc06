"""Kept sets in a proof: requests that attend to all of their cache, and to about half of it, beside ones without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sglang_probe.errors import ConfigError
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.kept_requests import KeptRequest, record_kept
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from sglang_probe.run.hook_points import RESID_POST, parse_hook_point
from sglang_probe.run.run import Run
from sglang_probe.stats.distance import row_distance
from sglang_probe.verify.check import Check
from sglang_probe.verify.reference import tolerance

NAME = "kept sets"
_PROMPTS, _NEW = 4, 16
_LONGEST = 256
"""Of a prompt: the masked model holds a mask of its square for each kv head."""


def deepest(hook_points: Sequence[str]) -> str:
    """The last residual among hook points, whose rows are compared.

    Raises:
        ConfigError: there is none.
    """
    points = {parse_hook_point(h).layer or 0: h for h in hook_points if parse_hook_point(h).site == RESID_POST}
    if not points:
        raise ConfigError("kept sets are proved by rows of a residual", fix="add a `--hook-point ....hook_resid_post`")
    return points[max(points)]


def record(prepared: Prepared, prompts: Sequence[Sequence[int]], folder: Path, host: EngineHost, seed: int) -> Run:
    """Serve the first prompts that are long enough, greedily, each without a kept set and with two.

    Raises:
        ProbeError: the recording failed.
    """
    chosen = list(dict.fromkeys(tuple(p[:_LONGEST]) for p in prompts if len(p) >= _NEW))[:_PROMPTS]
    model, kept = prepared.model, {}
    generator = torch.Generator().manual_seed(seed)
    for i, prompt in enumerate(chosen):
        shape = (1, model.layers, model.kv_heads, len(prompt))
        kept[f"all-{i}"] = Kept(torch.ones(shape, dtype=torch.bool))
        half = torch.rand(shape, generator=generator) < 0.5
        half[..., -1] = True
        kept[f"half-{i}"] = Kept(half)
    write_kept(folder / "kept.safetensors", kept)
    sampling = {"max_new_tokens": _NEW, "temperature": 0.0, "ignore_eos": True}
    requests = [KeptRequest(key, chosen[int(key.split("-")[1])], key, sampling=sampling) for key in kept]
    requests += [KeptRequest(f"plain-{i}", p, sampling=sampling) for i, p in enumerate(chosen)]
    return record_kept(prepared, folder / "kept", requests, kept=KeptFile(folder / "kept.safetensors"), host=host)


def checks(run: Run, kept: Mapping[str, Kept], model_path: str, hook_point: str) -> list[Check]:
    """What is asked of such a recording.

    Everything kept: the tokens of the same prompt without a kept set, all of them in float32; elsewhere rows as far as
    the tokens agree, past the cache at least. Less kept: rows are those of a `transformers` model under the same masks,
    and the first past the cache is not the row of the full cache.
    """
    from sglang_probe.verify import masked_model

    dtype = run.rows_dtype() or torch.float32
    limit = tolerance(hook_point, dtype)
    requests = [*run.requests().itertuples()]
    plain = {tuple(r.prompt_ids): r for r in requests if not isinstance(r.evict, str)}
    model = masked_model.load(model_path, dtype)
    layer = parse_hook_point(hook_point).layer
    assert layer is not None
    wrong: dict[bool, str | None] = {True: None, False: None}
    covered, worst, agreed = {True: 0, False: 0}, {True: 0.0, False: 0.0}, 0
    for r in requests:
        if not isinstance(r.evict, str):
            continue
        of, like = kept[r.evict], plain[tuple(r.prompt_ids)]
        whole, n = bool(of.keep_SYGN.all()), of.length
        rows, full = (run.activations(x.rid, hook_point) for x in (r, like))
        same = _agree([*r.prompt_ids, *r.output_ids], [*like.prompt_ids, *like.output_ids])
        if whole:
            agreed += same == len(r.prompt_ids) + len(r.output_ids)
            error = row_distance(rows[:same], full[:same])[0]
            if same <= n or (dtype == torch.float32 and same < len(r.prompt_ids) + len(r.output_ids)):
                wrong[whole] = wrong[whole] or f"{r.rid}: token {same} is another than without a kept set"
        else:
            ids = [*r.prompt_ids, *r.output_ids][: len(rows)]
            error = row_distance(rows, masked_model.hidden_states(model, ids, of)[layer].to(rows.dtype))[0]
            if (off := row_distance(rows[n : n + 1], full[n : n + 1])[0][0]) <= limit:
                wrong[whole] = wrong[whole] or f"{r.rid}: row {n} is that of the full cache ({off:.1e})"
        covered[whole] += len(error)
        worst[whole] = max(worst[whole], float(error.max()))
        if error.max() >= limit:
            wrong[whole] = wrong[whole] or f"{r.rid}: relative error {error.max():.2e} of a row, not below {limit:.2g}"
    number = sum(isinstance(r.evict, str) and bool(kept[r.evict].keep_SYGN.all()) for r in requests)
    told = {w: f"worst relative error of a row {worst[w]:.1e}, below {limit:.2g}" for w in worst}
    claim = "a request that keeps everything is served as one without a kept set"
    note = f"equal tokens in {agreed} of {number} requests; {told[True]}"
    half = "a request that keeps less has the rows of the masked `transformers` model, and not those of the full cache"
    return [
        Check(f"{NAME}, everything", claim, covered[True], "rows", wrong[True], note),
        Check(f"{NAME}, half", half, covered[False], "rows", wrong[False], told[False]),
    ]


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens agree from the first on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
