"""A server's clamps in the scheduler process: who waits for their gate, and when they are not put on anybody any more.

A request that asked for nothing uses the prefix cache as any other: its prompt is plain whatever the gate says, and
what it generates is plain unless the gate opens. Then it publishes nothing more, and if it is retracted reuses its
prompt alone.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_probe.engine.hooks.instruments.steered import Steered, gated, mark, steered_of
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering.clamps import Clamp, ClampConfig, read_clamps, spec_of_clamps
from sglang_probe.steering.library import Vector
from sglang_probe.steering.spec import Isolation, Spec

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.instruments.gates import Gate

logger = logging.getLogger("sglang_probe")


class Clamping:
    """The clamps of one engine process.

    Args:
        spec: what is done to a request whose gate opens.
    """

    def __init__(self, clamps: Sequence[Clamp], spec: Spec) -> None:
        self.clamps, self.spec = list(clamps), spec
        self._told = json.dumps(spec.to_json())
        self.off: str | None = None
        """Why new requests are not clamped any more."""
        self._decided = self._opened = self._missed = 0

    @classmethod
    def of(cls, given: Sequence[ClampConfig], library: Mapping[str, Vector], runner: Any) -> Clamping | None:
        """The clamps of a configuration, checked against the model; None: it has none.

        Raises:
            ConfigError: as `read_clamps` and `spec_of_clamps`.
        """
        if not given:
            return None
        clamps = read_clamps(
            given,
            library,
            width=runner.model_config.hidden_size,
            layers=len(runner.model.model.layers),
            weight_hash=weight_hash_of_folder(runner.server_args.model_path),
        )
        spec = spec_of_clamps(clamps, library)
        assert spec is not None
        return cls(clamps, spec)

    def now(self, *, updated: bool) -> Spec | None:
        """What new requests wait for; None: nothing.

        Args:
            updated: whether the engine's weights were.
        """
        if updated:
            self.stop("the weights were updated, and the features are of those before")
        return None if self.off is not None else self.spec

    def stop(self, why: str) -> None:
        """Clamp no new request."""
        if self.off is None:
            self.off = why
            logger.error("sglang-probe clamps nothing any more: %s", why)

    def wait(self, req: Any, prompt_len: int) -> None:
        """Have a request that asked for nothing wait for the gate."""
        waiting = weakref.ref(req)

        def decided(opened: bool) -> None:
            self._decided += 1
            if opened and (req := waiting()) is not None:
                self._opened += 1
                req.skip_radix_cache_insert = True

        steered = gated(self.spec, prompt_len, self._told, Isolation(None, prompt_len), decided)
        steered.of_server = True
        mark(req, steered)

    def missed(self, req: Any) -> None:
        """The gate of a request that asked for nothing was not decided when it should have been, by a fault of ours: it
        goes on without."""
        mark(req, None)
        self._missed += 1
        logger.error("sglang-probe did not decide the gate of the clamps for a request, which goes on without them")

    def status(self) -> dict[str, Any]:
        """For `GET /probe/status`."""
        told = [c.told() for c in self.clamps]
        counts = {"decided": self._decided, "opened": self._opened, "missed": self._missed}
        return {"of": told, **counts, "off": self.off}


def is_untouched(req: Any) -> bool:
    """Whether a request waits for the clamps alone, and nothing was done to it, so that it can go on without."""
    s: Steered | None = steered_of(req)
    if s is None or not s.of_server:
        return False
    gate: Gate | None = s.gate
    return gate is None or gate.decision is None or s.spec is None
