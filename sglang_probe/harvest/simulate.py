"""The way to SGLang's radix tree without an engine, for studies."""

from __future__ import annotations

from typing import Any, Protocol


class Tree(Protocol):
    """What a replay needs of a cache (`sglang_probe.engine.releases.simulated_tree.SimulatedTree`)."""

    page: int

    @property
    def free(self) -> int: ...

    def match(self, ids: Any, limit: int, space: str | None) -> tuple[int, Any]: ...

    def slots(self, node: Any) -> Any: ...

    def lock(self, node: Any) -> Any: ...

    def unlock(self, lock: Any) -> None: ...

    def make_room(self, tokens: int) -> None: ...

    def take(self, tokens: int) -> Any: ...

    def give_back(self, slots: Any) -> None: ...

    def insert(
        self, ids: Any, slots: Any, protected: int, inserted: int, prompt: int, space: str | None
    ) -> tuple[int, Any]: ...

    def flush(self) -> None: ...


def simulated_tree(tokens: int, page: int, policy: str, policy_config: dict[str, Any] | None = None) -> Tree:
    """SGLang's radix tree over a pool of so many slots.

    Raises:
        UnsupportedError: the installed SGLang was not reviewed for it, or has no such policy.
    """
    from sglang_probe.engine.releases.simulated_tree import SimulatedTree

    return SimulatedTree(tokens, page, policy, policy_config)
