"""Rows as SAELens' `ActivationsStore` reads them (`use_cached_activations`, `cached_activations_path`).

The folder is a `datasets` dataset on disk (`load_from_disk`): a row for each context, a column named like the hook
point of shape `[context_size, d_in]`, and `token_ids` (SAELens 6.54 `cache_activations_runner.py`).
Reused positions of a context are gathered from the requests that computed them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.export.contexts import Contexts, cut, require_contexts
from sglang_probe.export.folder import new_folder
from sglang_probe.run import journal
from sglang_probe.run.batches import in_parts
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run

_SHARD = 512
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Written:
    """What was written, and what was left out (`contexts.Contexts`)."""

    contexts: int
    repeated: int
    rest: int


def export_saelens(
    run: Run,
    folder: Path,
    hook_point: str,
    *,
    context: int = 128,
    overwrite: bool = False,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Written:
    """Write the rows of a hook point.

    Args:
        context: positions of a context: `context_size` of the trainer's configuration.

    Raises:
        ConfigError: the folder is there, no text is long enough, or the package `datasets` is missing.
        RunDirectoryError: the run lacks the hook point.
    """
    try:
        from datasets import Array2D, Dataset, Features, Sequence, Value
    except ImportError as e:
        raise ConfigError(
            f"SAELens reads folders of the package `datasets`: {e}", fix="pip install datasets, or use `export hf`"
        ) from e
    count, repeated, rest, width = 0, 0, 0, run.row_layout(hook_point)[0]
    for _, _, found in _contexts(run, hook_point, context):
        count, repeated, rest = count + len(found.places), repeated + found.repeated, rest + found.rest
    require_contexts(count + repeated, context)
    if not count:
        raise ConfigError(f"{run.path} has no context of {context} positions with a row of its own")
    features = Features(
        {
            hook_point: Array2D(shape=(context, width), dtype="float32"),
            "token_ids": Sequence(Value(dtype="int32"), length=context),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        done = 0
        for source, ids, found in _contexts(run, hook_point, context):
            for places in found.places:
                yield {hook_point: run.rows(hook_point, source[places]).float().numpy(), "token_ids": ids[places]}
                done += 1
                if done % _SHARD == 1 or done == count:
                    tell(done, count)

    with new_folder(folder, overwrite=overwrite) as made, tempfile.TemporaryDirectory() as cache:
        # Without a fingerprint `datasets` pickles the generator to make one, progress bar and all.
        named = journal.sha256(run.path / MANIFEST)
        dataset = Dataset.from_generator(rows, features=features, cache_dir=cache, fingerprint=named[:16])
        dataset.save_to_disk(str(made))
    return Written(count, repeated, rest)


def _contexts(run: Run, hook_point: str, context: int) -> Iterator[tuple[Array, Array, Contexts]]:
    """Some requests at a time the row and token id of each position, and the contexts among them."""
    for tokens in in_parts(run, None):
        source = tokens["source_row"].to_numpy()
        has = run.holds(hook_point, source)
        # A hole in the positions ends a context, as the end of a text does.
        follows = tokens["position"].diff().eq(1) & tokens["rid"].eq(tokens["rid"].shift())
        text = (~follows).cumsum().to_numpy()
        found = cut(text, has, (tokens["row"].to_numpy() == source) & has, context)
        yield source, tokens["token_id"].to_numpy(np.int32), found
