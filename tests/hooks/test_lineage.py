"""Which caches the lineage is proved for."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_probe.errors import UnsupportedError
from sglang_probe.hooks.lineage import refuse_other_trees

ComponentType = pytest.importorskip("sglang.srt.mem_cache.unified_cache.components").ComponentType


def radix_tree(*components: Any) -> Any:
    """SGLang's tree with these components; none of its memory is needed to ask what it is made of."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    tree = object.__new__(UnifiedRadixCache)
    tree.components = dict.fromkeys(components)
    return tree


def test_full_attention_is_proved() -> None:
    refuse_other_trees(radix_tree(ComponentType.FULL))


@pytest.mark.parametrize("other", [c for c in ComponentType if c is not ComponentType.FULL])
def test_other_components_are_refused_by_name(other: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"UnifiedRadixCache with components: .*{other.value}"):
        refuse_other_trees(radix_tree(ComponentType.FULL, other))


def test_other_caches_are_refused_by_name() -> None:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

    class Another(BasePrefixCache):  # type: ignore[misc]
        """A cache that SGLang's registry could be given."""

    Another.__abstractmethods__ = frozenset()
    with pytest.raises(UnsupportedError, match="Another with components: none"):
        refuse_other_trees(object.__new__(Another))
