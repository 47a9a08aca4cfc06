"""Which positions and which heads rows are recorded of.

Whether a position is selected depends on nothing but its place in its request, so that the choice can be repeated from
the ledger and checked. Of a retracted request the same positions are selected when it is computed again. Row numbers
are given to every computed position, selected or not; what a hook point holds of them is written beside its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from sglang_probe.config import Config
from sglang_probe.errors import ConfigError
from sglang_probe.run.hook_points import (
    ATTENTION,
    EMBED,
    QUERY,
    RESID_POST,
    ROTATED_QUERY,
    SCORES,
    expand,
    has_patterns,
    named_layers,
    parse_hook_point,
    parse_pattern,
)

Array = np.ndarray[Any, Any]
SITES = (EMBED, RESID_POST, SCORES, *ATTENTION)
_QUERIES = (QUERY, ROTATED_QUERY)
_PLACES = {"prefill", "window", "decode"}


class Every(Config):
    """Decode steps 1, 1 + every, 1 + 2 · every, ..."""

    every: PositiveInt
    """Distance of two selected steps."""


class Steps(Config):
    """Decode steps by number."""

    steps: list[PositiveInt] = Field(min_length=1)
    """The selected steps; 1 is the position after the prompt."""


Decode = Literal["all", "none"] | Every | Steps


class Selection(Config):
    """Positions and heads of one hook point. By default all.

    Decode step s computes position `prompt_len + s - 1`: step 1 is the first that attends as generated text.
    """

    prefill: Literal["all", "none"] = "all"
    """Positions of the prompt. Giving `window` alone means `none` besides it."""
    window: int = Field(default=0, ge=0)
    """Positions at the end of the prompt that are selected in any case: the observation window."""
    decode: Decode = "all"
    """Positions after the prompt."""
    heads: list[int] | None = None
    """Query heads; by default all."""
    kv_heads: list[int] | None = None
    """Kv heads of keys and values; by default all."""

    @model_validator(mode="before")
    @classmethod
    def _window_alone(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("window") and "prefill" not in data:
            return {**data, "prefill": "none"}
        return data

    @model_validator(mode="after")
    def _heads_are_a_set(self) -> Selection:
        for name in ("heads", "kv_heads"):
            chosen = getattr(self, name)
            if chosen is not None and (not chosen or sorted(set(chosen)) != chosen or chosen[0] < 0):
                raise ValueError(f"`{name}` must be ascending numbers from 0, each once, and at least one")
        return self

    @property
    def selects_all(self) -> bool:
        """Whether every position is selected."""
        return self.prefill == "all" and self.decode == "all"

    def positions(self, position_N: Array, prompt_len_N: Array) -> Array:
        """Which positions are selected, bool `[N]`; `prompt_len_N` of the request of each."""
        step = position_N - prompt_len_N  # 0 at decode step 1
        prompt = step >= -self.window if self.prefill == "none" else np.ones(len(step), dtype=bool)
        if self.decode == "all":
            decoded: Any = True
        elif self.decode == "none":
            decoded = False
        elif isinstance(self.decode, Every):
            decoded = step % self.decode.every == 0
        else:
            decoded = np.isin(step + 1, self.decode.steps)
        return np.asarray(np.where(step < 0, prompt, decoded), dtype=bool)

    def heads_of(self, site: str) -> list[int] | None:
        """Heads of a hook point at `site` that are selected; None: all of them, or its rows are not per head."""
        if site not in ATTENTION:
            return None
        return self.heads if site in _QUERIES else self.kv_heads


class RowsConfig(Selection):
    """`rows` of a configuration: one selection for the run, and others for some of its hook points."""

    at: dict[str, Selection] = Field(default_factory=dict)
    """Selections in the place of the run's, by hook point (`blocks.0.attn.hook_v`), pattern of hook points
    (`blocks.{0..5}.attn.hook_v`) or site (`attn.hook_rot_k`); the first of these that fits counts."""

    @model_validator(mode="after")
    def _known(self) -> RowsConfig:
        for name in self.at:
            if name not in SITES:
                try:
                    parse_pattern(name)
                except ConfigError as e:
                    raise ValueError(f"`at: {name}` is neither a hook point nor one of {', '.join(SITES)}: {e}") from e
        return self

    def of(self, hook_point: str) -> Selection:
        """The selection of a hook point."""
        site = parse_hook_point(hook_point).site
        return self.at.get(hook_point) or self.at.get(site) or Selection(**self.model_dump(exclude={"at"}))


def expanded(config: RowsConfig, hook_points: Sequence[str], layers: int | None) -> tuple[RowsConfig, list[str]]:
    """What to record, with the hook points that every pattern means in a model with so many layers.

    Args:
        layers: None: the least that a model with all the named layers has.

    Raises:
        ConfigError: two patterns of `at` mean one hook point.
    """
    patterns = [name for name in config.at if name not in SITES]
    if layers is None:
        layers = named_layers([*hook_points, *patterns])
    if not has_patterns([*hook_points, *patterns]):
        return config, list(hook_points)
    at = {name: s for name, s in config.at.items() if not has_patterns([name])}
    exact = set(at)
    for name in filter(lambda n: has_patterns([n]), patterns):
        for point in set(expand([name], layers)) - exact:
            if point in at:
                raise ConfigError(f"`rows: at: {name}`: another pattern selects at `{point}` too")
            at[point] = config.at[name]
    return config.model_copy(update={"at": at}), expand(hook_points, layers)


class Selected:
    """The positions that are selected at each hook point of a recording.

    `hook_embed` proves whose the rows of a position are. So it is selected wherever any other hook point
    is, unless it has a selection of its own.
    """

    def __init__(self, config: RowsConfig, hook_points: Iterable[str]) -> None:
        hook_points = list(hook_points)
        self._of = {h: [config.of(h)] for h in hook_points}
        others = {s.model_dump_json(include=_PLACES): s for h, (s,) in self._of.items() if h != EMBED}
        if EMBED in self._of and EMBED not in config.at and others:
            self._of[EMBED] = list(others.values())
        self.partial = [h for h, s in self._of.items() if not any(x.selects_all for x in s)]
        """Hook points that do not select every position."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for h in self.partial:
            groups.setdefault(tuple(s.model_dump_json(include=_PLACES) for s in self._of[h]), []).append(h)
        self._groups = list(groups.values())
        """Hook points that select the same positions."""

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Selected:
        """What a run was recorded with."""
        found = cls(RowsConfig.model_validate(manifest.get("rows_kept") or {}), manifest["hook_points"])
        if manifest.get("withheld"):  # rows of any hook point were taken out afterwards
            found.partial = list(manifest["hook_points"])
        return found

    def positions(self, hook_point: str, position_N: Array, prompt_len_N: Array) -> Array:
        """Which positions a hook point selects, bool `[N]`."""
        chosen = [s.positions(position_N, prompt_len_N) for s in self._of[hook_point]]
        return np.asarray(np.logical_or.reduce(chosen))

    def offsets(self, starts: list[int], ends: list[int], prompt_lens: list[int]) -> dict[str, Array]:
        """Of a forward that computes `[starts[i], ends[i])` of each request, the tokens that each partial hook point
        selects, by their place in the forward, ascending int64."""
        if not self.partial:
            return {}
        first, lengths = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64) - starts
        total = int(lengths.sum())
        position = np.arange(total) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
        prompt_len = np.repeat(np.array(prompt_lens, dtype=np.int64), lengths)
        selected = {}
        for group in self._groups:
            offsets = np.flatnonzero(self.positions(group[0], position, prompt_len))
            selected.update(dict.fromkeys(group, offsets))
        return selected


def check_selection(config: RowsConfig, hook_points: Iterable[str]) -> None:
    """Refuse a selection of something that is not captured: a typing error in `at` would select every position.

    Raises:
        ConfigError: `at` names it.
    """
    _rows, points = expanded(config, list(hook_points), None)
    known = {*points, *(parse_hook_point(h).site for h in points)}
    for name in config.at:
        means = [name] if name in SITES else expand([name], named_layers([*points, name]))
        if known.isdisjoint(means):
            raise ConfigError(f"`rows: at: {name}` selects from a hook point that is not among `hook_points`")


def selected_heads(
    config: RowsConfig, heads: Mapping[str, list[int]]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Of `[heads, head_dim]` by hook point what is selected, and the numbers of the heads where it is not all of them.

    Raises:
        ConfigError: the model does not have such a head.
    """
    counts, numbers = {}, {}
    for name, (count, head_dim) in heads.items():
        site = parse_hook_point(name).site
        chosen = config.of(name).heads_of(site)
        if chosen is not None and chosen[-1] >= count:
            what = "heads" if site in _QUERIES else "kv_heads"
            raise ConfigError(f"`rows: {what}` names head {chosen[-1]}; `{name}` has {count}, numbered from 0")
        if chosen is not None and len(chosen) < count:
            numbers[name] = chosen
        counts[name] = [count if chosen is None else len(chosen), head_dim]
    return counts, numbers
