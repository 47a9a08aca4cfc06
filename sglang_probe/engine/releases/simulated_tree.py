"""SGLang's own radix tree over its own allocator, without a model and without a device: for replays.

Reviewed on 0.5.23: `UnifiedRadixCache` with full attention, its core in Rust. Slots are numbers that nobody writes to.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from sglang_probe.errors import UnsupportedError

RELEASES = ("0.5.23",)


class SimulatedTree:
    """One replica's cache.

    Args:
        tokens: KV slots of the pool.
        page: SGLang's page size.
        policy: eviction policy, a name of SGLang.

    Raises (on construction):
        UnsupportedError: it was not reviewed on the installed release, or SGLang has no such policy.
    """

    def __init__(self, tokens: int, page: int, policy: str, policy_config: dict[str, Any] | None = None) -> None:
        from sglang_probe.engine.hooks.inventory import installed_version

        if (version := installed_version()) not in RELEASES:
            raise UnsupportedError(
                f"the radix tree of SGLang {version} was not reviewed for replays", fix=f"install {RELEASES[-1]}"
            )
        import torch
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.page = page
        self._pool = TokenToKVPoolAllocator(tokens, torch.float32, "cpu", SimpleNamespace(), need_sort=False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=SimpleNamespace(device="cpu"),
            token_to_kv_pool_allocator=self._pool,
            page_size=page,
            eviction_policy=policy,
            eviction_policy_config=policy_config,
            tree_components=(ComponentType.FULL,),
        )
        try:
            self._tree: Any = UnifiedRadixCache(params)
        except (ValueError, KeyError) as e:
            raise UnsupportedError(f"SGLang has no eviction policy `{policy}`: {e}", fix="e.g. lru, lfu, slru") from e

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return int(self._pool.available_size())

    def match(self, ids: Sequence[int], limit: int, space: str | None) -> tuple[int, Any]:
        """How much of a prefix the tree gives, and where that ends in it."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        found = self._tree.match_prefix(MatchPrefixParams(key=self._key(ids[: max(limit, 0)], space)))
        return int(found.device_prefix_len), found.last_device_node

    def slots(self, node: Any) -> Any:
        """The slots of a prefix, int64 `[n]`."""
        return self._tree.path_device_indices(node)

    def lock(self, node: Any) -> Any:
        """Keep a prefix from eviction."""
        return self._tree.lock(node)

    def unlock(self, lock: Any) -> None:
        """Let it go."""
        self._tree.unlock(lock)

    def make_room(self, tokens: int) -> None:
        """Evict until so many slots are free, or nothing more can be evicted."""
        self._pool.evict_to_free_tokens(self._tree, tokens)

    def take(self, tokens: int) -> Any:
        """Slots, int64 `[tokens]`; None: there are not so many."""
        return self._pool.alloc(tokens)

    def give_back(self, slots: Any) -> None:
        """Free slots."""
        if len(slots):
            self._pool.free(slots)

    def insert(
        self, ids: Sequence[int], slots: Any, protected: int, inserted: int, prompt: int, space: str | None
    ) -> tuple[int, Any]:
        """Publish a prefix as `checkpoint_into_tree` does, and once more to cut its leaf at the end of the prompt.

        Returns its length in whole pages, and where it ends in the tree. Slots of `[protected, what the tree had)` are
        free then.

        Args:
            protected: of the prefix, what the tree has already; inserted: what this request published before.
        """
        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        whole = len(ids) // self.page * self.page
        values = slots[:whole].to(torch.int64)
        told = InsertParams(
            key=self._key(ids[:whole], space), value=values.clone(), prev_prefix_len=protected, inserted_len=inserted
        )
        done = self._tree.insert(told)
        cut = prompt // self.page * self.page
        if 0 < cut < whole:
            again = self._key(ids[:cut], space)
            self._tree.insert(
                InsertParams(key=again, value=values[:cut].clone(), prev_prefix_len=cut, inserted_len=cut, priority=1)
            )
        return whole, done.last_device_node

    def flush(self) -> None:
        """Empty the tree."""
        self._tree.reset()
        self._pool.clear()

    @staticmethod
    def _key(ids: Sequence[int], space: str | None) -> Any:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(array("q", ids), space)
