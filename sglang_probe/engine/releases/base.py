"""What a release's adapter answers. Imports nothing of SGLang, because SGLang loads it while it imports itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from sglang_probe.errors import UnsupportedError

Hook = tuple[str, Callable[..., Any], str]
"""Target, function, and `AROUND`, `AFTER` or `BEFORE`."""


class Release(ABC):
    """The differences of one SGLang release. Hook functions are those of `engine/hooks/` wherever the signature
    allows; otherwise the adapter's own, which call them."""

    version: ClassVar[str]

    tree: ClassVar[str]
    """Dotted path of the class of the radix tree of full attention."""

    trees: ClassVar[str] = "the radix tree of full attention"
    """What `is_handled_tree` accepts, in words."""

    latent: ClassVar[bool] = False
    """Whether the ledger of models with multi-head latent attention was attacked."""

    cpu_platform: ClassVar[str]
    """Dotted path of the CPU reference platform."""

    cpu_attention: ClassVar[tuple[str, ...]]
    """Attention backends of that platform, the default of a harvest first."""

    cpu_widens: ClassVar[bool]
    """Whether that platform is told of the loaded model, and can have it multiply bf16 in fp32 (`platform/linear.py`).
    """

    cpu_ranks: ClassVar[bool]
    """Whether several tensor- or data-parallel ranks start on that platform."""

    row_channel: ClassVar[str]
    """Module of what carries rows off an accelerator (`row_hooks`)."""

    overshoots_at_length: ClassVar[bool]
    """Whether overlap scheduling computes one step after a finish by length too, and not by a stop alone."""

    namespace_fields: ClassVar[tuple[str, ...]]
    """Fields of a request that separate prefixes besides its tokens."""

    refused: ClassVar[Mapping[str, tuple[Any, str]]]
    """Server arguments that only this release has: the value that is fine, and what any other turns on."""

    not_shown: ClassVar[frozenset[str]] = frozenset()
    """Features of the inventory whose places were read, and which no engine of this release has shown to be right."""

    shown_points: ClassVar[frozenset[str] | None] = None
    """Hook points whose rows were compared with the model in an engine of this release; None: all that it captures."""

    residual_of: ClassVar[frozenset[str]] = frozenset()
    """Architectures beside the reviewed ones whose embeddings and residual stream, and nothing else, were compared with
    the model in an engine of this release (`run/hook_points.py`, `check_rows_of`)."""

    # The radix tree and its publications

    @abstractmethod
    def publication_hooks(self) -> list[Hook]:
        """Where a request's entries enter the tree, and where the tree is emptied (`engine/hooks/tree.py`)."""

    @abstractmethod
    def is_handled_tree(self, tree: Any) -> bool:
        """Whether this is one of `trees`, or no tree at all."""

    def taken(self, result: Any) -> Sequence[tuple[int, int]]:
        """Of an insertion: ranges of positions below what was new to the tree, of which it took the request's entries
        in the place of its own."""
        return ()

    def namespace(self, of: Any) -> tuple[Any, ...]:
        """What separates prefixes besides tokens, of a `Req` or a `RadixKey`."""
        return tuple(getattr(of, field) for field in self.namespace_fields)

    @abstractmethod
    def protected_len(self, params: Any, req: Any) -> int:
        """Positions of the request that the tree holds already when `insert(params)` publishes more of it."""

    @abstractmethod
    def bypass_hooks(self) -> list[Hook]:
        """The match whose length becomes the reused prefix."""

    # Requests and batches

    @abstractmethod
    def request_hooks(self) -> list[Hook]:
        """Where a request has been made and is not queued yet (`engine/hooks/requests.py`)."""

    @abstractmethod
    def abort_hooks(self) -> list[Hook]:
        """What the scheduler calls for every request that it drops outside a forward's result."""

    @abstractmethod
    def refusal_hooks(self) -> list[Hook]:
        """Where SGLang takes requests whose rows the ledger has no place for, such as beams: they are refused."""

    @abstractmethod
    def committed_len(self, req: Any) -> int:
        """Positions with a KV slot, that of a decode step about to run included."""

    @abstractmethod
    def in_beam(self, req: Any) -> bool:
        """Whether the request's rows are those of beams."""

    @abstractmethod
    def dp_rank(self, scheduler: Any) -> int:
        """Data-parallel rank of this process; 0 where there is one rank."""

    # The model

    @abstractmethod
    def residual(self, forward_batch: Any, output: Any) -> Any:
        """The residual stream `[tokens, d_model]` after a decoder layer that gave `output`."""

    def changeable_residual(self, forward_batch: Any, output: Any) -> Any:
        """The tensor `[tokens, d_model]` to which a change of the residual stream after a decoder layer is added, in
        place. It is a summand of `residual`, and complete on every rank.

        Raises:
            UnsupportedError: it was not reviewed on this release, or the layer left nothing to add to.
        """
        raise UnsupportedError(f"interventions were not reviewed on SGLang {self.version}")

    @abstractmethod
    def row_hooks(self) -> list[Hook]:
        """How rows leave an accelerator with the result of their forward (`instruments/accelerator.py`): the copy is
        enqueued after the forward and before the event that SGLang waits for when it processes the result."""

    # Weights

    @abstractmethod
    def weight_hooks(self) -> list[Hook]:
        """Every way by which the weights of a running engine change (`engine/hooks/weights.py`)."""

    @abstractmethod
    def weight_version(self, server_args: Any) -> str:
        """SGLang's name of the weights that were loaded at the start."""

    @abstractmethod
    def weight_version_after(self, request: Any) -> str | None:
        """SGLang's name of the weights once an update has been carried out; None: it has not got one."""

    # Commands and answers

    @abstractmethod
    def control_hooks(self) -> list[Hook]:
        """Where `/set_internal_state` takes the probe's commands (`engine/hooks/control.py`)."""

    @abstractmethod
    def live_hooks(self) -> list[Hook]:
        """Where the internal state is read, and where an answer's `meta_info` is built (`instruments/live.py`)."""

    # Traces

    @abstractmethod
    def trace_hooks(self) -> list[Hook]:
        """Where SGLang ends the OpenTelemetry span of a request in the scheduler (`instruments/traces.py`)."""

    # Server arguments

    @abstractmethod
    def argument_names(self, server_args: type[Any]) -> set[str]:
        """Fields of the class `ServerArgs`."""

    @abstractmethod
    def arguments_in_force(self, server_args: Any) -> dict[str, Any]:
        """Fields and values of a `ServerArgs` in the scheduler's process, as SGLang has resolved them."""
