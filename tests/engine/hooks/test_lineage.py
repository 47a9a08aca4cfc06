"""Which caches the lineage is proved for."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.engine.hooks import tree as lineage
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.tree import refuse_beside_rows, refuse_other_trees
from sglang_probe.engine.releases import release, release_0_5_21, release_0_5_23
from sglang_probe.errors import UnsupportedError

ComponentType = pytest.importorskip("sglang.srt.mem_cache.unified_cache.components").ComponentType

UNIFIED = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"


def radix_tree(kind: str, *components: Any) -> Any:
    """SGLang's tree with these components; none of its memory is needed to ask what it is made of."""
    tree = object.__new__(resolve_name(kind))
    tree.components = dict.fromkeys(components)
    return tree


def test_full_attention_is_proved() -> None:
    refuse_other_trees(radix_tree(release().tree, ComponentType.FULL))


@pytest.mark.skipif(release().tree != UNIFIED, reason="this release keeps sliding windows in a tree of another class")
def test_sliding_windows_beside_it_are_proved_and_alone_are_not() -> None:
    refuse_other_trees(radix_tree(UNIFIED, ComponentType.FULL, ComponentType.SWA))
    two, one = radix_tree(UNIFIED, ComponentType.FULL, ComponentType.SWA), radix_tree(UNIFIED, ComponentType.FULL)
    rows = EngineProbeConfig(run=Path(), hook_points=["blocks.0.hook_resid_post"])
    measured = rows.model_copy(update={"telemetry": object()})
    refuse_beside_rows(two, rows)
    refuse_beside_rows(one, measured)
    with pytest.raises(UnsupportedError, match=r"`telemetry`.*pool of their own"):
        refuse_beside_rows(two, measured)
    with pytest.raises(UnsupportedError, match="components: swa"):
        refuse_other_trees(radix_tree(UNIFIED, ComponentType.SWA))


def test_latent_attention_is_refused_by_name_where_it_was_not_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    latent, plain = (SimpleNamespace(attention_arch=SimpleNamespace(name=name)) for name in ("MLA", "MHA"))
    monkeypatch.setattr(lineage, "release", release_0_5_23.Adapter)
    lineage.refuse_latent(latent)
    monkeypatch.setattr(lineage, "release", release_0_5_21.Adapter)
    lineage.refuse_latent(plain)
    with pytest.raises(UnsupportedError, match=r"latent attention \(MLA\) is not proved on SGLang 0\.5\.21"):
        lineage.refuse_latent(latent)


@pytest.mark.parametrize(
    "other",
    [c for c in ComponentType if c not in (ComponentType.FULL, *([ComponentType.SWA] * (release().tree == UNIFIED)))],
)
def test_other_components_are_refused_by_name(other: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"UnifiedRadixCache with components: .*{other.name.lower()}"):
        refuse_other_trees(radix_tree(UNIFIED, ComponentType.FULL, other))


def test_other_caches_are_refused_by_name() -> None:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

    class Another(BasePrefixCache):  # type: ignore[misc]
        """A cache that SGLang's registry could be given."""

    Another.__abstractmethods__ = frozenset()
    with pytest.raises(UnsupportedError, match="Another with components: none"):
        refuse_other_trees(object.__new__(Another))
