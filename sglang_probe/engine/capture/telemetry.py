"""Attention telemetry of decode steps, while they are served: a few numbers per step, layer and head.

Batched over the requests of a forward and over heads. The definitions are those of `attention/telemetry.py`, which
computes the same from captured rows; `tests/end_to_end/test_queries.py` compares the two.

Shapes: B decode steps (one of each request), H query heads, G kv heads, R = H / G, J keys of the longest request, P
prompt keys of the longest prompt, D head dim, M remembered steps.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.run.telemetry_options import REGIONS, TelemetryOptions

SYSTEM = REGIONS.index("system")
_UNSEEN = -1e30
"""Logit of a key after the step. Not -inf: its weight times its logit must be 0, not NaN."""
_BLOCK_ELEMENTS = 1 << 25
"""Elements of keys held at once in float32: 128 MiB."""


@dataclass(frozen=True)
class Steps:
    """The decode steps that one forward measures, as host arrays of length B."""

    at: np.ndarray[Any, Any]
    """Which row of the batch."""
    prompt: np.ndarray[Any, Any]
    keys: np.ndarray[Any, Any]
    """Number of keys that the step sees, itself included."""
    system: np.ndarray[Any, Any]
    """Ranges of positions of the system prompt, `[B, K, 2]`; (0, 0) fills up."""
    system_known: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.at)


@dataclass
class Measured:
    """What the writer needs of one forward: numbers `[L, B, H]` by name, top positions and weights `[L, B, H, k]`."""

    layers: list[int]
    numbers: dict[str, np.ndarray[Any, Any]]
    top_positions: np.ndarray[Any, Any]
    top_weights: np.ndarray[Any, Any]
    rids: list[str]
    attempts: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    forward_id: int = -1

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(x.nbytes for x in (*self.numbers.values(), self.top_positions, self.top_weights))

    def without(self, rids: Container[str]) -> Measured | None:
        """The same without the steps of some requests; None if no step is left."""
        keep = [i for i, rid in enumerate(self.rids) if rid not in rids]
        if not keep:
            return None
        return replace(
            self,
            numbers={name: x[:, keep] for name, x in self.numbers.items()},
            top_positions=self.top_positions[:, keep],
            top_weights=self.top_weights[:, keep],
            rids=[self.rids[i] for i in keep],
            attempts=self.attempts[keep],
            positions=self.positions[keep],
        )


def logits(q_BW: Tensor, pool_SGD: Tensor, slots_BJ: Tensor, scaling: float) -> Tensor:
    """Scaled q·k in float32 of each step with the keys in its KV slots, `[B, H, J]`."""
    _, kv_heads, head_dim = pool_SGD.shape
    batch, length = slots_BJ.shape
    block = max(1, _BLOCK_ELEMENTS // (length * kv_heads * head_dim))
    if batch > block:
        pieces = zip(torch.split(q_BW, block), torch.split(slots_BJ, block), strict=True)
        return torch.cat([logits(q, pool_SGD, slots, scaling) for q, slots in pieces])
    k_BJGD = pool_SGD.flatten(1).index_select(0, slots_BJ.flatten()).view(batch, length, kv_heads, head_dim)
    k_XJD = k_BJGD.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 1)
    q_XRD = (q_BW.float() * scaling).view(batch * kv_heads, -1, head_dim)
    return torch.bmm(q_XRD, k_XJD.transpose(1, 2)).view(batch, -1, length)


@dataclass(frozen=True)
class _Places:
    """Masks of the keys of each request, on the device; the same for all layers."""

    unseen_B1J: Tensor
    prompt_B1P: Tensor
    regions_BJR: Tensor
    """1 in the region of each key."""
    keys_B1: Tensor
    system_unknown_B1: Tensor

    @classmethod
    def of(cls, steps: Steps, options: TelemetryOptions, device: torch.device) -> _Places:
        j = np.arange(steps.keys.max())
        keys, prompt = steps.keys[:, None], steps.prompt[:, None]
        system = ((j[:, None] >= steps.system[:, None, :, 0]) & (j[:, None] < steps.system[:, None, :, 1])).any(-1)
        chosen = [j >= keys, j >= prompt, j < options.sinks, j >= prompt - options.window, system]
        region = np.select([np.broadcast_to(c, system.shape) for c in chosen], [-1, 4, 0, 3, 1], default=2)

        def put(x: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        return cls(
            unseen_B1J=put((j >= keys)[:, None]),
            prompt_B1P=put((j[: steps.prompt.max()] < prompt)[:, None].astype(np.float32)),
            regions_BJR=put((region[..., None] == np.arange(len(REGIONS))).astype(np.float32)),
            keys_B1=put(keys.astype(np.float32)),
            system_unknown_B1=put(~steps.system_known[:, None]),
        )


class Memory:
    """Attention over the prompt in the last `M` measured steps of each running request, per layer.

    A request has a place from its first measured step to its end.

    Args:
        most_bytes: what it may take of the device's memory; None: whatever it needs.
    """

    def __init__(self, layers: int, memory: int, most_bytes: int | None = None) -> None:
        self._size, self._most_bytes = memory, most_bytes
        self._past: list[Tensor | None] = [None] * layers
        self._place: dict[str, int] = {}
        self._free: list[int] = []
        self._held = np.empty((0, memory), dtype=np.int64)  # number of the measured step in each cell; -1: none
        self.fresh: list[int] = []
        """Places of requests that were not measured before, in which an earlier request may have left something."""

    def places(self, rids: list[str]) -> np.ndarray[Any, Any]:
        """Places of requests, int64 `[B]`."""
        for rid in rids:
            if rid not in self._place:
                if not self._free:
                    grown = max(8, 2 * len(self._held))
                    self._free = list(range(len(self._held), grown))[::-1]
                    self._held = np.pad(self._held, ((0, grown - len(self._held)), (0, 0)), constant_values=-1)
                self._place[rid] = place = self._free.pop()
                self._held[place] = -1
                self.fresh.append(place)
        return np.array([self._place[r] for r in rids], dtype=np.int64)

    def end(self, rid: str) -> None:
        """Forget a request that ended."""
        place = self._place.pop(rid, None)
        if place is not None:
            self._free.append(place)

    def complete(self, places: np.ndarray[Any, Any], step: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Whether the `M` measured steps before each `step` are all there, bool `[B]`."""
        before = step[:, None] - np.arange(1, self._size + 1)
        held = np.take_along_axis(self._held[places], before % self._size, 1)
        return np.asarray(((held == before) & (before >= 0)).all(1))

    def has_room(self, heads: int, prompt: int) -> bool:
        """Whether steps of all requests that have a place can be remembered, with prompts of up to `prompt` keys."""
        if self._most_bytes is None:
            return True
        width = max(prompt, *(0 if past is None else past.shape[3] for past in self._past), 0)
        return 4 * len(self._past) * self._held.size * heads * width <= self._most_bytes

    def past(
        self, layer: int, places: np.ndarray[Any, Any], places_B: Tensor, fresh_N: Tensor, heads: int, prompt: int
    ) -> Tensor:
        """What is remembered, `[B, M, H, P]`; a view of the buffer or a copy.

        Args:
            places_B, fresh_N: `places` and `fresh` on the device, int64.
        """
        past = self._past[layer]
        if past is None or past.shape[0] < len(self._held) or past.shape[3] < prompt:
            old = past
            width = max(prompt, 0 if old is None else old.shape[3])
            past = torch.zeros((len(self._held), self._size, heads, width), device=places_B.device)
            if old is not None:
                past[: old.shape[0], ..., : old.shape[3]] = old
            self._past[layer] = past
        if len(fresh_N):  # what an earlier request left there
            past.index_fill_(0, fresh_N, 0.0)
        first = int(places[0])
        if np.array_equal(places, np.arange(first, first + len(places))):  # so while nobody comes or goes
            return past[first : first + len(places), ..., :prompt]
        return past.index_select(0, places_B)[..., :prompt]

    def cells(self, places: np.ndarray[Any, Any], step: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Where these steps are remembered, for `remember`, int64 `[B]`."""
        return places * self._size + step % self._size

    def remember(self, layer: int, cells_B: Tensor, p_BHP: Tensor) -> None:
        """Remember this step of a layer."""
        past = self._past[layer]
        assert past is not None
        room = past.shape[3] - p_BHP.shape[2]
        past.flatten(0, 1).index_copy_(0, cells_B, torch.nn.functional.pad(p_BHP, (0, room)) if room else p_BHP)

    def remembered(self, places: np.ndarray[Any, Any], step: np.ndarray[Any, Any]) -> None:
        """All layers have remembered these steps."""
        self._held[places, step % self._size] = step
        self.fresh.clear()


class Telemetry:
    """Measures decode steps of the layers of one engine.

    Args:
        layers: their numbers, in the order in which `measure` takes them.
    """

    def __init__(self, layers: list[int], options: TelemetryOptions) -> None:
        self.layers, self.options = layers, options
        self.memory = Memory(len(layers), options.memory)

    def measure(self, steps: Steps, rids: list[str], logits_of: Any, device: torch.device) -> dict[str, Tensor]:
        """Numbers `[L, B, H]` by name, and `top_positions` (int32, -1 where there are fewer keys) and `top_weights`,
        `[L, B, H, k]`.

        Args:
            rids: the request of each step.
            logits_of: gives the `[B, H, J]` scaled q·k of the i-th layer.
        """
        places = self.memory.places(rids)
        step = (steps.keys - 1 - steps.prompt) // self.options.every
        at = _Places.of(steps, self.options, device)
        places_B, fresh_N = (torch.tensor(x, dtype=torch.int64).to(device) for x in (places, self.memory.fresh))
        cells_B = torch.from_numpy(self.memory.cells(places, step)).to(device)
        incomplete_B1 = torch.from_numpy(~self.memory.complete(places, step)[:, None]).to(device)
        found = []
        for i in range(len(self.layers)):
            numbers, p_BHP = _numbers(logits_of(i), at, self.options)
            past_BMHP = self.memory.past(i, places, places_B, fresh_N, p_BHP.shape[1], p_BHP.shape[2])
            numbers["jump"] = jump_scores(p_BHP, past_BMHP.mean(1)).masked_fill(incomplete_B1, torch.nan)
            self.memory.remember(i, cells_B, p_BHP)
            found.append(numbers)
        self.memory.remembered(places, step)
        return {name: torch.stack([numbers[name] for numbers in found]) for name in found[0]}


def _numbers(logits_BHJ: Tensor, at: _Places, options: TelemetryOptions) -> tuple[dict[str, Tensor], Tensor]:
    """All but the jump score, and the weights over the prompt alone, normalised, `[B, H, P]`."""
    log_BHJ = torch.log_softmax(logits_BHJ.masked_fill_(at.unseen_B1J, _UNSEEN), -1)
    a_BHJ = log_BHJ.exp()
    terms_BHJ = a_BHJ * log_BHJ
    whole = -terms_BHJ.sum(-1)
    sinks = min(options.sinks, a_BHJ.shape[-1])
    rest = a_BHJ[..., sinks:].sum(-1)
    # Of weights a / rest: log(rest) - sum(a log a) / rest.
    without = rest.log() - terms_BHJ[..., sinks:].sum(-1) / rest
    masses_BHR = a_BHJ @ at.regions_BJR
    masses_BHR[..., REGIONS.index("prompt")] += masses_BHR[..., SYSTEM].masked_fill(~at.system_unknown_B1, 0)
    masses_BHR[..., SYSTEM].masked_fill_(at.system_unknown_B1, torch.nan)
    numbers = {
        "entropy": relative(whole, at.keys_B1),
        "entropy_without_sinks": relative(without, at.keys_B1 - options.sinks),
        "support": whole.exp(),
        **{f"mass_{r}": masses_BHR[..., i] for i, r in enumerate(REGIONS)},
    }
    numbers["top_positions"], numbers["top_weights"] = top(a_BHJ, options.top_k)
    p_BHP = a_BHJ[..., : at.prompt_B1P.shape[-1]] * at.prompt_B1P
    return numbers, p_BHP / p_BHP.sum(-1, keepdim=True)


def relative(h_BH: Tensor, keys_B1: Tensor) -> Tensor:
    most = keys_B1.log()
    return torch.where(most > 0, h_BH.clamp(min=0) / most, 0.0)


def top(a_BHJ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` positions with most weight (int32) and their weights, `[B, H, k]`, best first; -1 and 0 where there are
    fewer keys with any.

    In two stages: the k best keys are among the k blocks with the best maxima.
    """
    length = a_BHJ.shape[-1]
    size = max(1, int((length / k) ** 0.5))
    blocks = -(-length // size)
    if size > 1 and blocks > k:
        padded = torch.nn.functional.pad(a_BHJ, (0, blocks * size - length)).view(*a_BHJ.shape[:-1], blocks, size)
        best = padded.amax(-1).topk(k, sorted=False).indices
        near = padded.gather(2, best[..., None].expand(*best.shape, size)).flatten(2)
        weights, inside = near.topk(k)
        positions = best.gather(2, inside // size) * size + inside % size
    else:
        weights, positions = a_BHJ.topk(min(k, length))
    if length < k:
        weights, positions = (torch.nn.functional.pad(x, (0, k - length)) for x in (weights, positions))
    return positions.to(torch.int32).masked_fill(weights == 0, -1), weights


def jump_scores(p_BHP: Tensor, past_BHP: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, `[B, H]`; 0 where nothing is remembered is masked by the caller."""
    middle = (p_BHP + past_BHP) / 2
    entropies = [_entropy(x) for x in (middle, p_BHP, past_BHP)]
    return (entropies[0] - (entropies[1] + entropies[2]) / 2).clamp(min=0)


def _entropy(p_BHP: Tensor) -> Tensor:
    """In nats; weights of 0 count nothing."""
    return -(p_BHP * p_BHP.clamp(min=1e-38).log()).sum(-1)
