"""A captured request as a `Layer`: prompt window, cache and decode steps of one layer (`attention/from_run.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_probe.attention.from_run import attention_rows, head_rows, model_config
from sglang_probe.attention.rope import Rotary
from sglang_probe.errors import ProbeError
from sglang_probe.eviction.base import Method
from sglang_probe.eviction.keep import kept_of
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.eviction.registry import parse_method
from sglang_probe.kept_set import Kept
from sglang_probe.run.hook_points import QUERY, ROTATED_KEY, ROTATED_QUERY, VALUE
from sglang_probe.run.run import Run


def layer_from_run(
    run: Run, rid: str, layer: int, *, window: int | None = None, model: str | Path | None = None
) -> Layer:
    """The layer that request `rid` saw, in the dtype of the capture.

    Decode steps are the positions after the prompt that were computed, `output_len - 1` of them; a request of one
    output token has no `future`. Values and pre-RoPE queries are there if they were captured, of the same heads as keys
    and queries.

    Args:
        window: keep the last so many prompt queries; None: all. Needed of a run whose queries were captured for its
            observation window only (`rows: {window: 32}`).
        model: model folder, for the output projection (and the configuration, of a run whose manifest has none); None:
            without the projection.

    Raises:
        RunDirectoryError: no such request; post-RoPE queries or keys were not captured; or a position has no row.
        ProbeError: the configuration of the model is not at hand; or the run holds kv heads without all query heads
            that share them, or the reverse; or the request did not attend to its whole cache in the order of its
            positions (`attention.from_run.departs`).
    """
    rows = attention_rows(run, rid, layer, window=window, model=model)
    captured = {site for site in (VALUE, QUERY) if _beside(run, layer, site)}
    v = head_rows(run, rid, layer, VALUE) if VALUE in captured else None
    q_pre = head_rows(run, rid, layer, QUERY, first=rows.first) if QUERY in captured else None
    q, k, length, prompt = rows.q_NHD, rows.k_JGD, rows.length, rows.window
    return Layer(
        q_NHD=q[:prompt],
        k_LGD=k[:length],
        spec=rows.spec,
        v_LGD=None if v is None else v[:length],
        q_pre_NHD=None if q_pre is None else q_pre[:prompt],
        rotary=Rotary.from_model_config(rows.config),
        w_o_HDM=None if model is None else output_projection(Path(model), layer, rows.config)[rows.heads],
        index=torch.tensor(layer),
        num_layers=int(rows.config["num_hidden_layers"]),
        request=torch.tensor(rows.request),
        future=Queries(q[prompt:], k[length:], None if v is None else v[length:]) if rows.steps else None,
    )


def kept_sets(
    run: Run, method: Method | Mapping[str, Any] | str, budget: int | float, *, rids: Sequence[str] | None = None
) -> dict[str, Kept]:
    """What a method keeps of the prompts of a run that captured queries and keys of all layers.

    Args:
        method: e.g. `{"method": "snapkv", "window": 8}`, or its name alone.
        budget: positions per kv head and layer; below 1: a share of the prompt.
        rids: of which requests; None: all.

    Returns:
        By request id, bool `[1 or steps, layers, kv heads, prompt positions]`.

    Raises:
        ConfigError: no such method.
        ProbeError: as `layer_from_run`; or the method asks for more than a run of the full cache has.
    """
    policy = method if isinstance(method, Method) else parse_method(method)
    layers = range(int(model_config(run)["num_hidden_layers"]))
    kept = {}
    for rid in run.requests()["rid"] if rids is None else rids:
        found = [layer_from_run(run, rid, i) for i in layers]
        tokens = max(1, round(budget * found[0].length)) if budget < 1 else int(budget)
        kept[rid] = kept_of([policy.select(layer, tokens) for layer in found])
    return kept


def lookahead_from_run(run: Run, rid: str, layer: int, steps: int, *, start: int | None = None) -> Queries:
    """Queries, keys and values of `steps` positions of request `rid`: lookahead or pseudo tokens for `Layer.lookahead`.

    The request generated the lookahead tokens itself, perhaps from a compressed cache (LAQ), or had pseudo tokens as
    the end of its prompt (DapQ). The last sampled token has no query, so n lookahead queries need n + 1 new tokens.

    Args:
        start: first of the positions; None: the first after the prompt.

    Raises:
        RunDirectoryError: no such request, or post-RoPE queries or keys were not captured.
        ProbeError: the request has no row at any of these positions.
    """
    if start is None:
        start = int(run.requests().set_index("rid").loc[rid, "prompt_len"])

    def rows(site: str) -> Tensor:
        return head_rows(run, rid, layer, site)[start : start + steps]

    has_values = f"blocks.{layer}.{VALUE}" in run.hook_points
    q = rows(ROTATED_QUERY)
    if not len(q):
        raise ProbeError(f"request {rid} computed nothing from position {start} on", fix="generate more tokens")
    return Queries(q, rows(ROTATED_KEY), rows(VALUE) if has_values else None)


def _beside(run: Run, layer: int, site: str) -> bool:
    """Whether values or pre-RoPE queries were captured, of the heads of the keys or queries."""
    name = f"blocks.{layer}.{site}"
    partner = f"blocks.{layer}.{ROTATED_KEY if site == VALUE else ROTATED_QUERY}"
    return name in run.hook_points and run.head_numbers(name) == run.head_numbers(partner)


def output_projection(model: Path, layer: int, config: Mapping[str, Any]) -> Tensor:
    """`o_proj` of a layer by query head, `[H, D, M]`.

    Raises:
        ProbeError: the folder has no such weight in safetensors format.
    """
    from safetensors import safe_open

    name = f"layers.{layer}.self_attn.o_proj.weight"
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith(name):
                    w_MI: Tensor = f.get_tensor(key)
                    return w_MI.T.reshape(int(config["num_attention_heads"]), -1, w_MI.shape[0])
    raise ProbeError(f"{model} has no weight `{name}`", fix="give the folder of the run's model")
