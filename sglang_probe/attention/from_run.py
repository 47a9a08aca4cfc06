"""What one layer's attention read for one request of a run: its captured queries and keys.

Rows that the request reused come from the requests that computed them, so that a run with the prefix cache on gives the
same attention as one without, up to the floor.

Shapes: L prompt positions, T decode steps, J = L + T keys, N captured queries (the last N positions), H query heads, G
kv heads, R = H / G, D head dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sglang_probe.ask import recorded_override
from sglang_probe.attention.weights import AttentionSpec, attention_weights
from sglang_probe.errors import ProbeError
from sglang_probe.run.hook_points import ROTATED_KEY, ROTATED_QUERY
from sglang_probe.run.run import Run


@dataclass(frozen=True)
class AttentionRows:
    """Post-RoPE queries and keys of one layer of one request, in the dtype of the capture."""

    length: int
    """Number of prompt positions L."""
    q_NHD: Tensor
    """Queries of the positions from `first` on: the end of the prompt, then the decode steps."""
    k_JGD: Tensor
    first: int
    """Position of the first query, at most `length`."""
    heads: list[int]
    """Numbers of the query heads in the model."""
    spec: AttentionSpec
    config: Mapping[str, Any]
    """Configuration of the model."""
    request: int
    """Number of the request in the workload."""

    @property
    def window(self) -> int:
        """Number of prompt queries."""
        return self.length - self.first

    @property
    def steps(self) -> int:
        """Number of decode steps T."""
        return len(self.k_JGD) - self.length

    def decode_attention(self) -> Tensor:
        """Weights of the decode steps over prompt and generated keys, `[G, R, T, J]`.

        Raises:
            ProbeError: the request did not decode.
        """
        if not self.steps:
            raise ProbeError("decode steps are needed and the request has none", fix="generate more than one token")
        return attention_weights(self.q_NHD[self.window :], self.k_JGD, self.spec, first=self.length)


def attention_rows(
    run: Run, rid: str, layer: int, *, window: int | None = None, model: str | Path | None = None
) -> AttentionRows:
    """Queries and keys that layer `layer` had for request `rid`.

    Decode steps are the positions after the prompt that were computed, `output_len - 1` of them.

    Args:
        window: keep the last so many prompt queries; None: all. Needed of a run whose queries were captured for its
            observation window only (`rows: {window: 32}`).
        model: model folder, for the configuration of a run whose manifest has none.

    Raises:
        RunDirectoryError: no such request; queries or keys were not captured; or a position has no row.
        ProbeError: the configuration of the model is not at hand; or the run holds kv heads without all query heads
            that share them, or the reverse; or the request did not attend to its whole cache in the order of its
            positions (`departs`).
    """
    config = model_config(run, model)
    requests = run.requests(interrupted=True).set_index("rid")
    if rid in requests.index and (how := departs(requests.loc[rid])) is not None:
        raise ProbeError(
            f"request {rid} {how}: its layer is not the attention over a whole cache in order",
            fix="take a request without; `lookahead_from_run` gives its rows",
        )
    length = int(requests.loc[rid, "prompt_len"]) if rid in requests.index else 0
    first = 0 if window is None else max(0, length - window)
    heads = _whole_groups(run, layer, config)
    q_NHD = head_rows(run, rid, layer, ROTATED_QUERY, first=first)
    k_JGD = head_rows(run, rid, layer, ROTATED_KEY)
    # The scaling is that of all reviewed architectures. SGLang gives none of them a sliding window (models/llama.py,
    # qwen2.py, qwen3.py), whatever their configuration says.
    spec = AttentionSpec(scaling=q_NHD.shape[-1] ** -0.5)
    return AttentionRows(length, q_NHD, k_JGD, first, heads, spec, config, request=int(requests.loc[rid, "index"]))


def head_rows(run: Run, rid: str, layer: int, site: str, *, first: int = 0) -> Tensor:
    """Rows per head of a request at a site of a layer, from position `first` on, `[positions, heads, head_dim]`.

    Raises:
        RunDirectoryError: no such request, the hook point was not captured, or a position has no row.
    """
    name = f"blocks.{layer}.{site}"
    values = run.activations(rid, name, first=first)
    return values.view(len(values), *run.heads(name))


def departs(request: Any) -> str | None:
    """How a row of `run.requests()` departs from attention over its whole cache in the order of its positions."""
    if isinstance(request["evict"], str):
        return "has a kept set"
    params = request["sampling_params"]
    if isinstance(params, str) and recorded_override(params) is not None:
        return "has RoPE positions of its own"
    return None


def model_config(run: Run, model: str | Path | None = None) -> Mapping[str, Any]:
    """Configuration of the run's model: from the manifest, or from a model folder.

    Raises:
        ProbeError: neither has it.
    """
    if model is None and "model_config" in run.manifest:
        return dict(run.manifest["model_config"])
    file = Path(model or run.manifest["model_path"]) / "config.json"
    if not file.exists():
        raise ProbeError(
            f"{run.path} does not hold its model's configuration and there is no {file}", fix="give the model folder"
        )
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _whole_groups(run: Run, layer: int, config: Mapping[str, Any]) -> list[int]:
    """Numbers of the query heads that the run holds of a layer, which are those of its kv heads.

    Raises:
        ProbeError: they are not.
    """
    queries, keys = (run.head_numbers(f"blocks.{layer}.{site}") for site in (ROTATED_QUERY, ROTATED_KEY))
    heads = int(config["num_attention_heads"])
    group = heads // int(config.get("num_key_value_heads") or heads)
    if queries != [g * group + r for g in keys for r in range(group)]:
        raise ProbeError(
            f"{run.path} holds query heads {queries} and kv heads {keys} of layer {layer}; {group} query heads share a "
            "kv head, and a layer needs both sides of each",
            fix="record `rows: {heads: ..., kv_heads: ...}` of whole groups",
        )
    return queries
