"""What one request asks of the probe: `sampling_params.custom_params: {probe: {...}}`.

`Ask.of` is the only reader of that mapping and `Ask.into` its only writer, for a workload and for a client of a server
alike. Nothing in it is passed over: an unknown key, a wrong type or a value that cannot be had is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, field_validator

from sglang_probe.config import Config, parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.rows_ask import RowsAsk
from sglang_probe.steer_ask import MOST, Steer

WHERE = "custom_params.probe"
_MOST_RANGES = 64
"""Ranges of one system prompt; each costs telemetry a mask over all keys of the batch."""

_Name = Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
_Value = Annotated[StrictStr, Field(min_length=1, max_length=200)]

CacheUse = Literal["read_only", "write_only", "off"]


class PositionOverride(Config):
    """Positions from `start` on are rotated as those from `to` on. What a token can attend to is unchanged, so that
    position is manipulated and visibility is not."""

    start: StrictInt = Field(alias="from", ge=1)
    """First sequence position that is moved; what lies before it may come from the prefix cache."""
    to: StrictInt = Field(ge=0)
    """The RoPE position that `from` is given."""

    def moved(self, start: int, end: int) -> tuple[int, list[int]]:
        """Of sequence positions `[start, end)`: how many come before the override, and the RoPE positions of the
        rest."""
        first = min(max(start, self.start), end)
        return first - start, [p - self.start + self.to for p in range(first, end)]

    def last(self, length: int) -> int:
        """RoPE position of the last of `length` sequence positions."""
        return max(self.start - 1, length - 1 - self.start + self.to)


class Ask(Config):
    """What one request asks. Every field is None where the request says nothing."""

    force: tuple[Annotated[StrictInt, Field(ge=0)] | None, ...] | None = None
    """Token ids to decode in place of sampled ones; null at a step leaves that token to sampling."""
    cache: CacheUse | None = None
    """How it uses the prefix cache: `read_only` publishes nothing, `write_only` reuses nothing, `off` does neither."""
    positions: PositionOverride | None = None
    """Rotate the positions from `from` on as those from `to` on. The request publishes nothing."""
    evict: StrictStr | None = None
    """Name of a kept set (`sglang_probe.kept_set`): of the positions that the set is about, only those that it keeps
    are attended to after them."""
    steer: tuple[Steer, ...] | None = Field(default=None, max_length=MOST)
    """Interventions on the residual stream, in the order in which they act, by vectors of the engine's library
    (`sglang_probe.steer_ask`)."""
    system: tuple[tuple[StrictInt, StrictInt], ...] | None = Field(default=None, max_length=_MOST_RANGES)
    """Ranges `[start, end]` of prompt positions that telemetry counts as the system prompt."""
    labels: dict[_Name, _Value] | None = Field(default=None, max_length=8)
    """What the request belongs to, such as `{session: s-17, tenant: acme}`: axes by which `sglang-probe why` groups.
    Written as it is given."""
    rows: RowsAsk | None = None
    """Rows of its own positions, to be fetched after it ended (`sglang_probe.rows_ask`). A live server only."""
    provenance: StrictBool | None = None
    """Put the spans of the request into `meta_info["probe"]` of its answer. A live server only."""

    @field_validator("system")
    @classmethod
    def _are_ranges(cls, ranges: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        for start, end in ranges or ():
            if not 0 <= start <= end < 1 << 31:
                raise ValueError(f"[{start}, {end}] is no range of positions")
        return ranges

    @classmethod
    def of(cls, sampling_params: Any) -> Ask:
        """Read what a request asks.

        Args:
            sampling_params: a mapping, or SGLang's `SamplingParams`.

        Raises:
            ConfigError: it cannot be read; names the key, and the nearest known one of an unknown key.
        """
        if isinstance(sampling_params, Mapping):
            custom = sampling_params.get("custom_params")
        else:
            custom = sampling_params.custom_params
        if custom is None:
            return _NOTHING
        if not isinstance(custom, Mapping):
            raise ConfigError(f"`custom_params` is a mapping, not {type(custom).__name__}")
        asked = custom.get("probe")
        if asked is None:
            return _NOTHING
        if not isinstance(asked, Mapping):
            raise ConfigError(f"`{WHERE}` is a mapping, not {type(asked).__name__}")
        return parse_config({str(k): v for k, v in asked.items()}, cls, where=WHERE) if asked else _NOTHING

    def into(self, sampling_params: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling parameters that ask this too, over what they ask already.

        Raises:
            ConfigError: what they ask already cannot be read.
        """
        merged = Ask.of(sampling_params).model_copy(update={name: getattr(self, name) for name in self.fields})
        params = dict(sampling_params)
        if merged.fields:
            params["custom_params"] = {**(params.get("custom_params") or {}), "probe": merged.to_json()}
        return params

    def to_json(self) -> dict[str, Any]:
        """The mapping that `of` reads."""
        told: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        if self.steer is not None:
            told["steer"] = [s.model_dump(mode="json", exclude_defaults=True) for s in self.steer]
        if self.rows is not None:
            told["rows"] = self.rows.model_dump(mode="json", exclude_none=True)
        return {k: v for k, v in told.items() if v is not None}

    @property
    def fields(self) -> frozenset[str]:
        """Names of what is asked."""
        return frozenset(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def private(self) -> bool:
        """Whether the entries of the request are not those of its tokens at their places in a full cache, so that no
        other request may have them."""
        return self.evict is not None or self.positions is not None

    @property
    def publishes(self) -> bool:
        """Whether the request leaves its entries in the prefix cache."""
        return not self.private and self.cache not in ("read_only", "off")

    @property
    def reads(self) -> bool:
        """Whether the request may reuse entries of the prefix cache."""
        return self.cache not in ("write_only", "off")

    def check(self, *, prompt_len: int, new_tokens: int, context: int, vocabulary: int) -> None:
        """Refuse values that the request at hand cannot have.

        Args:
            new_tokens: tokens that may be generated. context: positions that the model has. vocabulary: its token ids.

        Raises:
            ConfigError: names key and value.
        """
        for i, token in enumerate(self.force or ()):
            if token is not None and token >= vocabulary:
                raise ConfigError(f"{WHERE}.force[{i}]: token {token} is not within the vocabulary of {vocabulary}")
        if (p := self.positions) is not None and (p.start >= prompt_len or p.last(prompt_len + new_tokens) >= context):
            raise ConfigError(
                f"{WHERE}.positions: from {p.start} to {p.to} is not within a prompt of {prompt_len} tokens and a "
                f"context of {context}"
            )
        for start, end in self.system or ():
            if end > prompt_len:
                raise ConfigError(f"{WHERE}.system: [{start}, {end}] is not within a prompt of {prompt_len} tokens")

    def refuse_beyond(self, honoured: frozenset[str]) -> None:
        """Refuse what a recording was not started for.

        Raises:
            ConfigError: names the keys.
        """
        if beyond := sorted(self.fields - honoured):
            raise ConfigError(
                f"{WHERE}: this recording was not started for {', '.join(f'`{name}`' for name in beyond)}; it honours "
                f"{', '.join(f'`{name}`' for name in sorted(honoured)) or 'nothing'}"
            )

    def refuse_on_ranks(self, one_rank: frozenset[str]) -> None:
        """Refuse, under tensor parallelism, what only one rank would do.

        Raises:
            ConfigError: names the keys.
        """
        if alone := sorted(self.fields & one_rank):
            raise ConfigError(
                f"{WHERE}: {', '.join(f'`{name}`' for name in alone)} under tensor parallelism would be done by one "
                "rank alone, and the others would compute something else"
            )


_NOTHING = Ask()


def recorded(sampling_params: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters as `requests.parquet` has them. Of `custom_params` only what changes the rows that a token
    gives: its RoPE positions, and interventions."""
    told = {k: v for k, v in sampling_params.items() if k != "custom_params"}
    ask = Ask.of(sampling_params)
    return Ask(positions=ask.positions, steer=ask.steer).into(told)


def recorded_override(sampling_params: str) -> PositionOverride | None:
    """The RoPE positions in column `sampling_params` of `run.requests()`."""
    return Ask.of(json.loads(sampling_params)).positions


def recorded_steer(sampling_params: str) -> tuple[Steer, ...]:
    """The interventions in column `sampling_params` of `run.requests()`."""
    return Ask.of(json.loads(sampling_params)).steer or ()
