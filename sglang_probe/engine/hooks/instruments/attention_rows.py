"""Taps at the attention of a layer: queries, keys and values.

Post-RoPE rows and values are the arguments of the layer's `RadixAttention`; keys and values are what it hands to the
cache, before a `kv_cache_dtype` rounds them. Pre-RoPE rows are the arguments of `self_attn.rotary_emb`, which is one
module for all layers (SGLang caches it by its parameters, `layers/rotary_embedding/factory.py`), so that the layer is
taken from the `self_attn` that is running. Taps copy at once: on some devices the rotation is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang_probe.engine.hooks import guard
from sglang_probe.errors import UnsupportedError
from sglang_probe.run.hook_points import KEY, QUERY, ROTATED_KEY, ROTATED_QUERY, VALUE, HookPoint

Names = dict[str, str]
"""Hook point by site, of one layer."""


Write = Callable[[str, Any], None]
"""Takes what a hook point sees, `[tokens, width]`."""


def install_attention_taps(layers: Sequence[Any], points: Sequence[HookPoint], write: Write) -> None:
    """Hook what `points` need, and hand it to `write`.

    Raises:
        UnsupportedError: a layer's attention is not built as in the reviewed architectures.
    """
    by_layer: dict[int, Names] = {}
    for point in points:
        assert point.layer is not None
        by_layer.setdefault(point.layer, {})[point.site] = point.name
    running = _Running(write)
    rotary: dict[int, Any] = {}
    for layer, names in by_layer.items():
        attention = layers[layer].self_attn
        check_attention(attention, layer)
        check_fused(attention, layer, names)
        stored = {site: names[site] for site in (ROTATED_QUERY, ROTATED_KEY, VALUE) if site in names}
        if stored:
            attention.attn.register_forward_pre_hook(_argument_hook(write, stored))
        unrotated = {site: names[site] for site in (QUERY, KEY) if site in names}
        if unrotated:
            attention.register_forward_pre_hook(running.enter(unrotated))
            attention.register_forward_hook(running.leave)
            rotary[id(attention.rotary_emb)] = attention.rotary_emb
    for module in rotary.values():
        module.register_forward_pre_hook(running.rotate)


FUSED_ROTATIONS = ("use_fused_qk_norm_rope", "use_fused_qk_norm_rope_cpu", "use_fused_qk_norm_mrope")
"""Flags of SGLang's attention modules: the kernel that normalises queries and keys also rotates them, within the output
of the projection (`models/qwen3_moe.py`, `apply_qk_norm_rope`; `models/qwen3.py` on ROCm)."""


def check_fused(attention: Any, layer: int, names: Names) -> None:
    """Refuse rows from before the rotation where they never exist as a tensor.

    A rotation in place is no such case (the tap copies first), nor is one that stores keys and values as well:
    attention is handed the rotated keys all the same.

    Raises:
        UnsupportedError: names the hook point and SGLang's flag.
    """
    missing = [names[site] for site in (QUERY, KEY) if site in names]
    flags = [f for f in FUSED_ROTATIONS if getattr(attention, f, False)]
    if missing and flags:
        raise UnsupportedError(
            f"`{missing[0]}` is not there in layer {layer}: one kernel normalises and rotates (SGLang: `{flags[0]}`)",
            fix="capture `hook_rot_q` and `hook_rot_k` and rotate back by the position (`sglang_probe.attention.rope`; "
            "exact up to the rounding of the model's dtype), or set `enable_fused_qk_norm_rope: false`",
        )


def check_attention(attention: Any, layer: int) -> None:
    """Refuse attention that is not built as in the reviewed architectures.

    Raises:
        UnsupportedError: names what is there instead.
    """
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    core = getattr(attention, "attn", None)
    rotary = getattr(attention, "rotary_emb", None)
    if not isinstance(core, RadixAttention) or not isinstance(rotary, RotaryEmbedding):
        raise UnsupportedError(
            f"layer {layer} has {type(core).__name__} after {type(rotary).__name__}, which has not been reviewed",
            fix="capture the residual stream alone",
        )
    if core.v_head_dim != core.head_dim:
        raise UnsupportedError(
            f"layer {layer} has values of another width ({core.v_head_dim}) than keys ({core.head_dim})",
            fix="capture the residual stream alone",
        )


class _Running:
    """The layer whose attention is running, for the rotary module that all layers share."""

    def __init__(self, write: Write) -> None:
        self._names: Names | None = None
        self._write = write

    def enter(self, names: Names) -> Callable[..., None]:
        def enter(_module: Any, _args: Any) -> None:
            self._names = names

        return enter

    def leave(self, _module: Any, _args: Any, _output: Any) -> None:
        self._names = None

    def rotate(self, _module: Any, args: tuple[Any, ...]) -> None:
        if self._names is not None:
            _write_sites(self._write, self._names, (QUERY, KEY), args[1:3])


def _argument_hook(write: Write, names: Names) -> Callable[..., None]:
    def write_arguments(_module: Any, args: tuple[Any, ...]) -> None:
        _write_sites(write, names, (ROTATED_QUERY, ROTATED_KEY, VALUE), args[:3])

    return write_arguments


@guard.tapping
def _write_sites(write: Write, names: Names, sites: Sequence[str], tensors: Sequence[Any]) -> None:
    found = dict(zip(sites, tensors, strict=True))
    for site, name in names.items():
        if found[site] is None:
            raise UnsupportedError(f"`{name}`: SGLang hands no such tensor to attention; a kernel before it stored it")
        write(name, found[site].flatten(1))
