"""The base of all axes, and what they are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang_probe.axes.batch import Array, Batch
from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError

UNKNOWN = "unknown"
"""Class of positions that an axis cannot judge, e.g. because a live recording kept no token ids."""


class Axis:
    """Gives every position a class.

    `labels` is called once for every batch, in workload order, after `begin`; an axis that says `observes` sees every
    batch once before that, in `observe`.
    """

    needs_ids: bool = False
    observes: bool = False

    def __init__(self, name: str, classes: list[str]) -> None:
        self.name = name
        self.classes = classes
        """Class names; a label is an index into it. It may grow while labels are given."""

    def observe(self, batch: Batch) -> None:
        """See a batch of the whole workload before the first label is asked for."""

    def begin(self) -> None:
        """A pass over the workload begins."""

    def labels(self, batch: Batch) -> Array:
        """uint16 [N]: class number of each position."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sources:
    """What axes are made from: the names that the workload used, and the tokenizer."""

    segments: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class names of each axis that the workload labelled."""
    model: Path | None = None
    """Folder with the tokenizer; only axes that read tokens or the chat template need it."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's vocabulary.

        Raises:
            ConfigError: the model's folder is not known, or holds no tokenizer.
        """
        return Vocabulary.load(self._folder())

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as `transformers` loads it, for its chat template."""
        try:
            from transformers import AutoTokenizer
        except ImportError as e:
            raise ConfigError("the axis `role` renders the chat template, which needs `transformers`") from e
        return AutoTokenizer.from_pretrained(str(self._folder()))

    def _folder(self) -> Path:
        if self.model is None or not self.model.is_dir():
            raise ConfigError(
                f"the tokenizer is not at hand: no folder {self.model}", fix="give the model's folder with --model"
            )
        return self.model
