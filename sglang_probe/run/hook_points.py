"""Names of hook points, as in TransformerLens, and the engine module of each.

`hook_q` and `hook_k` are what the rotary embedding takes (after q/k norm, where a model has one), `hook_rot_q` and
`hook_rot_k` what it gives: those attention uses and, of keys, the cache stores. TransformerLens keeps one axis for the
heads; here a row is flat, `[heads * head_dim]`, and `run.rows(..., split_heads=True)` restores the axis. Keys and
values have kv heads, not repeated for the query heads that share them.

`hook_scores`, which is ours, is what probes say of `hook_resid_post`: `x @ w` in fp32, a column a probe, instead of the
row (`scores` of the configuration).

Wherever hook points are given, a name may be a pattern of layers (`parse_pattern`); a run holds the names it means.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_probe.errors import ConfigError, UnsupportedError

EMBED = "hook_embed"
RESID_POST = "hook_resid_post"
QUERY, ROTATED_QUERY = "attn.hook_q", "attn.hook_rot_q"
KEY, ROTATED_KEY = "attn.hook_k", "attn.hook_rot_k"
VALUE = "attn.hook_v"
ATTENTION = (QUERY, ROTATED_QUERY, KEY, ROTATED_KEY, VALUE)
SCORES = "hook_scores"
SITES_IN_LAYER = (RESID_POST, SCORES, *ATTENTION)
_IN_LAYER = re.compile(r"blocks\.(0|[1-9][0-9]*)\.(.+)")
_PATTERN = re.compile(r"blocks\.(\*|\{[^{}]*\}|[0-9]+)\.(.+)")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)(?:\.\.([0-9]+))?")
_FORMS = (
    "`blocks.*.` is every layer, `blocks.{4..12}.` a range, `blocks.{0..28..4}.` every fourth, `blocks.{0,5}.` a list"
)


@dataclass(frozen=True)
class HookPoint:
    """A parsed name. `layer` is None for the embedding; `site` is the name within the layer."""

    name: str
    layer: int | None
    site: str

    @property
    def in_attention(self) -> bool:
        """Whether rows are per head."""
        return self.site in ATTENTION


@dataclass(frozen=True)
class Pattern:
    """A parsed name or pattern of names. `layers` is None for the embedding, empty for every layer."""

    name: str
    layers: tuple[int, ...] | None
    site: str

    def names(self, layers: int) -> list[str]:
        """The hook points of a model with so many layers. A layer that is named is there, whether the model has it or
        not (`check_hook_points`)."""
        if self.layers is None:
            return [self.name]
        return [f"blocks.{i}.{self.site}" for i in self.layers or range(layers)]


def parse_hook_point(name: str) -> HookPoint:
    """Parse `hook_embed` or `blocks.<layer>.<site>`, site being `hook_resid_post` or one of `ATTENTION`.

    Raises:
        ConfigError: any other name; a pattern too.
    """
    if name == EMBED:
        return HookPoint(name, None, EMBED)
    match = _IN_LAYER.fullmatch(name)
    if match and match.group(2) in SITES_IN_LAYER:
        return HookPoint(name, int(match.group(1)), match.group(2))
    raise _unknown(name)


def parse_pattern(name: str) -> Pattern:
    """Parse a name or a pattern: `blocks.*.`, `blocks.{4..12}.`, `blocks.{0..28..4}.` or `blocks.{0,5,10}.` and a site.

    Raises:
        ConfigError: it is neither; says what there is.
    """
    if name == EMBED:
        return Pattern(name, None, EMBED)
    match = _PATTERN.fullmatch(name)
    if not match or match.group(2) not in SITES_IN_LAYER:
        raise _unknown(name)
    which, site = match.groups()
    if which.startswith("0") and which != "0":
        raise ConfigError(
            f"hook point `{name}`: layers have no leading zeros", fix=f"write `blocks.{int(which)}.{site}`"
        )
    return Pattern(name, () if which == "*" else _layers(name, which.strip("{}")), site)


def expand(names: Iterable[str], layers: int) -> list[str]:
    """Hook points with every pattern in place of those that it means, each once, in order.

    Raises:
        ConfigError: a name is no hook point and no pattern.
    """
    return list(dict.fromkeys(found for name in names for found in parse_pattern(name).names(layers)))


def has_patterns(names: Iterable[str]) -> bool:
    """Whether one of these stands for others."""
    return any("*" in name or "{" in name for name in names)


def named_layers(names: Iterable[str]) -> int:
    """Layers that a model has at least, if it has all that these names and patterns name."""
    return 1 + max((i for name in names for i in parse_pattern(name).layers or ()), default=0)


def _layers(name: str, listed: str) -> tuple[int, ...]:
    found: list[int] = []
    for item in (part.strip() for part in listed.split(",")):
        if match := _RANGE.fullmatch(item):
            first, last, step = int(match.group(1)), int(match.group(2)), int(match.group(3) or 1)
            if first > last or not step or last - first > _MOST_LAYERS:
                raise ConfigError(f"hook point `{name}`: `{item}` is no range of layers", fix=_FORMS)
            found += range(first, last + 1, step)
        elif re.fullmatch("[0-9]+", item):
            found.append(int(item))
        else:
            raise ConfigError(f"hook point `{name}`: `{item}` is no layer and no range of layers", fix=_FORMS)
    return tuple(dict.fromkeys(found))


_MOST_LAYERS = 10_000
_ELSEWHERE = {
    "hook_resid_mid": "the residual stream between attention and MLP",
    "hook_mlp_out": "the output of the MLP",
    "hook_attn_out": "the output of the attention block",
    "hook_mlp_in": "the input of the MLP",
    "hook_attn_in": "the input of the attention block",
    "attn.hook_z": "the output of each head",
    "attn.hook_result": "the contribution of each head",
    "attn.hook_pattern": "the attention pattern",
    "attn.hook_attn_scores": "the attention scores",
    "mlp.hook_pre": "the MLP before its activation",
    "mlp.hook_post": "the MLP after its activation",
    "ln1.hook_normalized": "the normalised input of attention",
    "ln2.hook_normalized": "the normalised input of the MLP",
    "ln1.hook_scale": "the scale of a norm",
    "ln2.hook_scale": "the scale of a norm",
    "ln_final.hook_normalized": "the output of the final norm",
    "ln_final.hook_scale": "the scale of the final norm",
    "hook_pos_embed": "position embeddings: the reviewed models rotate instead",
    "unembed": "the logits",
}
"""Hook points of TransformerLens that are not captured, and what they are."""


def _unknown(name: str) -> ConfigError:
    there_is = f"use `hook_embed` or `blocks.<layer>.` with one of {', '.join(SITES_IN_LAYER)}, "
    there_is += "e.g. blocks.0.hook_resid_post"
    match = _PATTERN.fullmatch(name)
    site = match.group(2) if match else name
    if site == "hook_resid_pre" and match:
        return ConfigError(
            f"hook point `{name}` has another name: what enters a layer is what left the one before it",
            fix=_of_resid_pre(name, match.group(1)),
        )
    if site in _ELSEWHERE:
        fix = there_is
        if "pattern" in site or "scores" in site:
            fix = f"capture `attn.hook_rot_q` and `attn.hook_rot_k`, of which it is made, or `telemetry`; {there_is}"
        return ConfigError(f"hook point `{name}` is not captured: it is {_ELSEWHERE[site]}", fix=fix)
    if re.match(r"(model\.)?layers\.", name):
        return ConfigError(f"hook point `{name}` is the name of a module", fix=there_is)
    near = difflib.get_close_matches(site, (*SITES_IN_LAYER, EMBED, *(f"hook_{s}" for s in ("q", "k", "v"))), n=1)
    hint = ""
    if near and match and near[0] != site:
        meant = f"attn.{near[0]}" if near[0] in ("hook_q", "hook_k", "hook_v") else near[0]
        hint = f"; did you mean `blocks.{match.group(1)}.{meant}`?" if meant != EMBED else ""
    elif match and site in ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k"):
        hint = f"; did you mean `blocks.{match.group(1)}.attn.{site}`?"
    elif near and not match:
        hint = f"; did you mean `{near[0] if near[0] == EMBED else 'blocks.*.' + near[0]}`?"
    return ConfigError(f"unknown hook point `{name}`{hint}", fix=f"{there_is}; {_FORMS}")


def _of_resid_pre(name: str, which: str) -> str:
    if which == "*":
        return f"use `{EMBED}` for layer 0, and `blocks.*.{RESID_POST}` for all that follow"
    try:
        wanted = _layers(name, which.strip("{}"))
    except ConfigError as e:
        return e.fix or ""
    return "use " + ", ".join(f"`blocks.{i - 1}.{RESID_POST}`" if i else f"`{EMBED}`" for i in wanted[:8])


def score_points(names: Iterable[str]) -> list[str]:
    """Those of `names` whose rows are scores of probes."""
    return [name for name in names if parse_hook_point(name).site == SCORES]


def attention_points(names: Iterable[str]) -> list[HookPoint]:
    """Those of `names` whose rows are per head."""
    return [h for h in map(parse_hook_point, names) if h.in_attention]


def check_tensor_parallel(names: Iterable[str], tp_size: int, *, telemetry: bool = False) -> None:
    """Refuse rows per head where each rank has some of the heads only.

    Raises:
        UnsupportedError: names the hook point.
    """
    points = attention_points(names)
    if (points or telemetry) and tp_size > 1:
        what = points[0].name if points else "telemetry"
        raise UnsupportedError(
            f"`{what}` under tensor parallelism (`tp_size: {tp_size}`): each rank has a share of the heads, "
            "and they are not put together yet",
            fix="capture the residual stream alone, or use `tp_size: 1`",
        )


def head_counts(names: Iterable[str], *, heads: int, kv_heads: int, head_dim: int) -> dict[str, list[int]]:
    """`[heads, head_dim]` of every hook point whose rows are per head, for the manifest."""
    points = attention_points(names)
    return {h.name: [heads if h.site in (QUERY, ROTATED_QUERY) else kv_heads, head_dim] for h in points}


REVIEWED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Architectures whose captured rows were compared with `transformers` at every kind of hook point
(tests/end_to_end/test_models.py, tests/end_to_end/test_queries.py)."""

_WINDOWED = ("MellumForCausalLM",)
"""Architectures to which SGLang gives the windows of their configuration."""

_MLA = (
    "{name} has multi-head latent attention (MLA): its queries are absorbed into the latent space and its cache holds "
    "no keys per head, so that `hook_rot_q` and `hook_rot_k` do not exist"
)
_REFUSED_ARCHITECTURES = {
    "Gemma2": "{name} caps its attention logits, which SGLang's `torch_native` attention does not do: on the CPU "
    "reference platform the engine does not compute the model",
    "Gemma3": "{name} has sliding-window layers that rotate outside their rotary module, and scales embeddings as they "
    "are looked up: neither pre-RoPE rows nor the proof of ownership can be had as of the reviewed ones",
    "DeepseekV2": _MLA,
    "DeepseekV3": _MLA,
}
"""Why architectures are refused that users ask for, by the beginning of their names."""


def check_architecture(name: str) -> None:
    """Refuse to read or change an architecture that was not compared with a reference at every kind of hook point.

    Raises:
        UnsupportedError: names the reviewed ones.
    """
    if name not in REVIEWED_ARCHITECTURES:
        known = next((why for start, why in _REFUSED_ARCHITECTURES.items() if name.startswith(start)), None)
        raise UnsupportedError(
            known.format(name=name)
            if known
            else f"capturing rows of {name} has not been compared with a reference, so they could be another tensor",
            fix=f"set `hook_points: []` to record the ledger alone; reviewed: {', '.join(REVIEWED_ARCHITECTURES)}",
        )


def check_rows_of(name: str, points: Iterable[str], residual_of: Collection[str], *, telemetry: bool) -> None:
    """Refuse rows of an architecture that were not compared with a reference.

    Args:
        points: hook points.
        residual_of: architectures of which the residual stream was compared, and nothing else: in these its hook points
            are not refused.
        telemetry: whether attention is measured.

    Raises:
        UnsupportedError: names the architecture and, where others of it may be captured, the hook point.
    """
    if name not in residual_of:
        return check_architecture(name)
    inside = [h.name for h in attention_points(points)]
    if not inside and not telemetry:
        return
    why = next((why for start, why in _REFUSED_ARCHITECTURES.items() if name.startswith(start)), None)
    raise UnsupportedError(
        f"`{inside[0] if inside else 'telemetry'}` of {name}: of this architecture the residual stream alone was "
        "compared with a reference" + (f"; {why.format(name=name)}" if why else ""),
        fix=f"capture `{EMBED}` and `blocks.<layer>.{RESID_POST}` alone",
    )


def check_sliding_window(config: Mapping[str, Any], context_length: int, architecture: str = "") -> None:
    """Refuse a sliding window that SGLang ignores: of the architectures that were compared at every hook point it gives
    none a window (`models/llama.py`, `qwen2.py`, `qwen3.py`, `mixtral.py`), so that beyond it the engine does not
    compute the model.

    Args:
        config: the text model's configuration. context_length: longest request that the engine takes.
        architecture: the model's.

    Raises:
        UnsupportedError: requests may be longer than the window.
    """
    window = None if architecture in _WINDOWED else config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False or context_length <= int(window):
        return
    if "sliding_attention" not in (config.get("layer_types") or ["sliding_attention"]):
        return
    raise UnsupportedError(
        f"the model is configured with a sliding window of {window} tokens, which SGLang ignores: requests of up to "
        f"{context_length} tokens attend to everything, as the model does not",
        fix=f"set `server: {{context_length: {window}}}` (`--context-length`), or record the ledger alone",
    )


def available(layers: int) -> list[str]:
    """All hook points of the residual stream of a model with this many layers."""
    return [EMBED, *(f"blocks.{i}.{RESID_POST}" for i in range(layers))]


def check_hook_points(names: list[str], layers: int) -> None:
    """Refuse layers that the model does not have.

    Raises:
        ConfigError: the message lists what exists.
    """
    for name in names:
        layer = parse_hook_point(name).layer
        if layer is not None and layer >= layers:
            raise ConfigError(
                f"hook point `{name}`: the model has {layers} layers, numbered 0 to {layers - 1}",
                fix="hook points of this model: "
                + ", ".join(available(layers))
                + f"; and of each layer {', '.join(ATTENTION)}",
            )


def engine_module(name: str) -> str:
    """Path of the engine module whose output a hook point is, for the manifest."""
    point = parse_hook_point(name)
    if point.layer is None:
        return "model.embed_tokens"
    attention = f"model.layers.{point.layer}.self_attn"
    return {
        RESID_POST: f"model.layers.{point.layer} (residual + hidden)",
        SCORES: f"model.layers.{point.layer} ((residual + hidden) @ w)",
        QUERY: f"{attention}.rotary_emb (argument query)",
        KEY: f"{attention}.rotary_emb (argument key)",
        ROTATED_QUERY: f"{attention}.attn (argument q)",
        ROTATED_KEY: f"{attention}.attn (argument k)",
        VALUE: f"{attention}.attn (argument v)",
    }[point.site]
