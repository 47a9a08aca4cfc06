"""One layer of one request of a run, as the drift study reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.errors import ProbeError
from sglang_probe.eviction.from_run import layer_from_run
from sglang_probe.eviction.layer import Layer
from sglang_probe.run import schema
from sglang_probe.run.hook_points import QUERY
from sglang_probe.run.run import Run
from sglang_probe.studies.query_drift.cosine import centre, prompt_mean


@dataclass(frozen=True)
class Captured:
    """Queries and keys of one layer, with the decode steps as the layer's `future`."""

    layer: Layer
    prompt_pre_LHD: Tensor
    decode_pre_THD: Tensor
    mean_HD: Tensor
    """Mean pre-RoPE query of prompts after the sinks: of this one, or of other requests (`mean_of_others`)."""
    window: int
    turns: tuple[tuple[int, int], ...] = ()
    """Where earlier answers of the assistant begin and end in the prompt of a chat."""

    @property
    def rotary(self) -> Rotary:
        rotary: Rotary = self.layer.require("rotary")
        return rotary

    @property
    def length(self) -> int:
        return self.layer.length

    @property
    def steps(self) -> int:
        return self.decode_pre_THD.shape[0]

    @property
    def window_at(self) -> Tensor:
        """Positions of the observation window."""
        return torch.arange(self.length - self.window, self.length)

    @property
    def decode_at(self) -> Tensor:
        """Positions of the decode steps."""
        return torch.arange(self.length, self.length + self.steps)

    @property
    def window_pre_NHD(self) -> Tensor:
        return self.prompt_pre_LHD[-self.window :]

    def centred(self, x_NHD: Tensor) -> Tensor:
        """Queries minus the prompt's mean query."""
        return centre(x_NHD, self.mean_HD)

    def attention_HTJ(self) -> Tensor:
        """Full-cache weights of the decode steps, `[H, T, L + T]`."""
        return self.layer.future_attention.flatten(0, 1)


def captured(run: Run, rid: str, layer: int, *, window: int, sinks: int) -> Captured:
    """Read one layer of one request in float32.

    Raises:
        RunDirectoryError: a position has no row anywhere in the run.
        ProbeError: queries or keys were not captured, or the request did not decode.
    """
    found = layer_from_run(run, rid, layer)
    if found.future is None:
        raise ProbeError(f"{rid} did not decode")
    prompt = found.pre_rope_queries().float()
    at = torch.arange(found.length, found.length + found.future.q_THD.shape[0])
    name = f"blocks.{layer}.{QUERY}"
    if name in run.hook_points:
        decode = run.activations(rid, name)[found.length :].view(len(at), *run.heads(name)).float()
    else:
        decode = found.require("rotary").unrotate(found.future.q_THD, at)
    mean = prompt_mean(prompt, sinks=sinks)
    return Captured(found, prompt, decode, mean, window, _turns(run, rid, found.length))


def _turns(run: Run, rid: str, length: int) -> tuple[tuple[int, int], ...]:
    requests = run.requests()
    segments = requests["segments"].to_numpy()[int(np.flatnonzero(requests["rid"].to_numpy() == rid)[0])]
    found = ((int(s["start"]), min(int(s["end"]), length)) for s in segments if s["name"] == "assistant")
    return tuple((start, end) for start, end in found if start < end)


def mean_of_others(means_HD: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean query of the other requests' prompts, equally weighted, for each request.

    A prompt's own mean would be taken from its window but from none of its decode queries: pairs within the prompt
    would look further apart than they are, and decoding nearer.

    Args:
        means_HD: of each prompt, by request; two or more.
    """
    total = torch.stack(list(means_HD.values())).sum(0)
    return {rid: (total - mine) / (len(means_HD) - 1) for rid, mine in means_HD.items()}


@dataclass(frozen=True)
class WindowCoverage:
    """Where the window's queries come from."""

    computed: int
    """Positions that the request computed itself."""
    gathered: int
    """Reused positions whose queries are those of the request that computed them."""
    missing: int
    """Reused positions whose origin has no row in this run."""
    own: np.ndarray
    """Which window positions the request computed, bool `[window]`."""


def window_coverage(run: Run, rid: str, length: int, window: int) -> WindowCoverage:
    """Fate of the last `window` positions of a prompt: a position from the prefix cache has no query of its own."""
    tokens = run.tokens_of(rid)
    tokens = tokens[(tokens["position"] >= length - window) & (tokens["position"] < length)].sort_values("position")
    own = (tokens["status"] == schema.COMPUTED).to_numpy()
    found = (tokens["source_row"] >= 0).to_numpy()
    return WindowCoverage(int(own.sum()), int((~own & found).sum()), int((~found).sum()), own)
