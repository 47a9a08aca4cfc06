"""Which caches the lineage is proved for."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import pytest

from sglang_probe.engine.hooks.tree import refuse_other_trees, refuse_rows_of
from sglang_probe.engine.releases import release
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
    with pytest.raises(UnsupportedError, match="pool of their own"):
        refuse_rows_of(radix_tree(UNIFIED, ComponentType.FULL, ComponentType.SWA))
    refuse_rows_of(radix_tree(UNIFIED, ComponentType.FULL))
    with pytest.raises(UnsupportedError, match="components: swa"):
        refuse_other_trees(radix_tree(UNIFIED, ComponentType.SWA))


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
