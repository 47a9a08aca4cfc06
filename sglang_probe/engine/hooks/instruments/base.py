"""The shape of an instrument: one thing that the probe can do for a request or in a forward pass.

The session keeps a list of the instruments that its configuration wants, and everybody asks that list: which hooks to
install, which features of the inventory must be as reviewed, whether a running engine serves another recording. An
instrument is one file, one field of `Ask` if requests ask for it, its rows in the inventory (`patches/`) and a line in
`instruments/__init__.py`. SGLang's own `state_capturer/base.py` has this shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sglang_probe.ask import Ask
from sglang_probe.engine.releases.base import Hook, Release

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.ledger.facts import ForwardPlan


@dataclass(slots=True)
class Forward:
    """A forward pass of the model, as `ModelRunner.forward` is called for it."""

    runner: Any
    batch: Any
    """SGLang's `ForwardBatch`."""
    plan: ForwardPlan | None
    """None: of no request, such as a warm-up."""
    replayed: bool = False
    """Whether it was replayed from a graph; known once it has run."""
    logits: Any = None
    """Of the next tokens, a row a request, where the model gave them; known once it has run."""


class Instrument:
    """Base class; every method does nothing until a subclass needs it.

    All of them run in the scheduler process. `launch`, `before`, `after` and `end` are guarded by their callers: what
    they raise stops the recording and no request. They must not wait for the device or touch the disk.
    """

    name: ClassVar[str]
    features: ClassVar[tuple[str, ...]] = ()
    """Features of the inventory that it needs."""
    field: ClassVar[str | None] = None
    """Field of `Ask` by which requests ask for it."""
    one_rank: ClassVar[bool] = False
    """Whether it acts on the rank alone that records, so that under tensor parallelism the others would part from it:
    such requests are refused there."""
    in_model: ClassVar[bool] = False
    """Whether it is attached to the model and told of each of its forward passes."""

    of_all: bool = False
    """Whether it is asked of every request, not of those alone that ask something (`admit`)."""

    # Of a configuration, before there is an engine

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        """Whether the configuration asks for it."""
        return cls.field in config.asks

    @classmethod
    def needs(cls, config: EngineProbeConfig) -> Sequence[str]:
        """Features of the inventory that it needs under this configuration."""
        return cls.features

    @classmethod
    def honours(cls, config: EngineProbeConfig) -> str | None:
        """Field of `Ask` that requests may use under this configuration, which wants it."""
        return cls.field

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        """What it patches in SGLang; several instruments may name the same hook."""
        return []

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        """Whether an engine that was started for one recording can make another."""
        return cls.wanted(started) or not cls.wanted(asked)

    # In the engine

    def __init__(self, config: EngineProbeConfig) -> None:
        self.config = config

    def attach(self, runner: Any) -> None:
        """The model is loaded; no graph has been captured yet.

        Args:
            runner: SGLang's `ModelRunner`.

        Raises:
            UnsupportedError: it cannot work here, and the engine does not start.
        """

    def check_captured(self, num_tokens: int) -> None:
        """A graph of so many tokens was captured, or the model was warmed up for it.

        Raises:
            LedgerError: the graph lacks what this instrument put into the model.
        """

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        """A recording begins; what is known of another one is forgotten.

        Raises:
            UnsupportedError: the engine cannot make it.
        """
        self.config = config

    def admit(self, ask: Ask, req: Any) -> None:
        """A request was made, and asks this.

        Raises:
            ConfigError: it cannot have it; SGLang refuses the request with this message.
        """

    def read_limit(self, ask: Ask, req: Any) -> int | None:
        """Positions that the request may reuse from the prefix cache at most; None: as SGLang decides."""
        return None

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        """A forward pass of these requests is about to be launched; `asks` are theirs, in the same order."""

    def before(self, forward: Forward) -> None:
        """The model is about to run."""

    def after(self, forward: Forward) -> None:
        """The model has run, or on an accelerator is about to: its operations are enqueued."""

    def launched(self) -> None:
        """The forward that `launch` announced is launched; any that runs before the next one is of no request."""

    def end(self, rid: str) -> None:
        """A request ended."""

    def close(self) -> None:
        """The recording was closed, with everything that is known written."""

    def drop(self) -> None:
        """Forget the forward at hand: the recording has stopped, or what runs next is of no request."""

    def library(self) -> tuple[str, str] | None:
        """What for it has loaded a library of vectors, and the library's hash; None: it has none."""
        return None

    def status(self) -> dict[str, Any]:
        """What `GET /probe/status` says of it."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it, once the model is loaded."""
        return {}


def forward_batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """SGLang's `ForwardBatch` among the arguments of a decoder layer."""
    if "forward_batch" in kwargs:
        return kwargs["forward_batch"]
    return next(a for a in args if hasattr(a, "forward_mode"))
