"""An axis by a Python function of the user's own: `module:function`.

    def classify(batch: Batch) -> tuple[np.ndarray, list[str]]

It receives a `Batch` of N positions (`batch.ids`, `batch.position`, `batch.offsets`, ...) and returns one integer a
position, `[N]`, and the names that the integers stand for. Names may differ from batch to batch. Set
`classify.needs_ids = False` if it does not read token ids, so that it works on recordings without them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_probe.axes.axis import Axis
from sglang_probe.axes.batch import Array, Batch
from sglang_probe.errors import ConfigError


class Function(Axis):
    """Classes by `module:function`, looked up on the path and in the current folder.

    Raises (on construction):
        ConfigError: there is no such function.
    """

    def __init__(self, spec: str) -> None:
        self._function = _find(spec)
        super().__init__(spec.partition(":")[2], [])
        self.needs_ids = bool(getattr(self._function, "needs_ids", True))

    def labels(self, batch: Batch) -> Array:
        """See `Axis`.

        Raises:
            ConfigError: what the function returned does not fit the batch.
        """
        codes, names = self._function(batch)
        codes = np.asarray(codes)
        if codes.shape != (len(batch),) or (len(codes) and not 0 <= codes.min() <= codes.max() < len(names)):
            raise ConfigError(
                f"axis `{self.name}`: expected {len(batch)} class numbers below {len(names)}, got shape {codes.shape}"
            )
        for name in names:
            if name not in self.classes:
                self.classes.append(name)
        return np.array([self.classes.index(n) for n in names], dtype=np.uint16)[codes]


def _find(spec: str) -> Callable[[Batch], tuple[Any, list[str]]]:
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"axis `{spec}`: {e}", fix="give `module:function`, with the module on the path") from e
    finally:
        sys.path.remove("")
    return found  # type: ignore[no-any-return]
