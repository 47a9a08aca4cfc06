"""Rows as SAELens' `ActivationsStore` reads them (`use_cached_activations`, `cached_activations_path`).

The folder is a `datasets` dataset on disk (`load_from_disk`): a row for each context, a column named like the hook
point of shape `[context_size, d_in]`, and `token_ids` (SAELens 6.54 `cache_activations_runner.py`).
Reused positions of a context are gathered from the requests that computed them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.export.contexts import Contexts, cut
from sglang_probe.export.folder import new_folder
from sglang_probe.run import journal
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.run.schema import OVERSHOOT

_SHARD = 512


def export_saelens(
    run: Run,
    folder: Path,
    hook_point: str,
    *,
    context: int = 128,
    overwrite: bool = False,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Contexts:
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
    tokens = run.tokens()
    tokens = tokens[(tokens["phase"] != OVERSHOOT) & tokens["intervention"].isna()]
    tokens = tokens.sort_values(["rid", "position"], kind="stable")
    source = tokens["source_row"].to_numpy()
    has = run.holds(hook_point, source)
    # A hole in the positions ends a context, as the end of a text does.
    follows = tokens["position"].diff().eq(1) & tokens["rid"].eq(tokens["rid"].shift())
    text = (~follows).cumsum().to_numpy()
    found = cut(text, has, (tokens["row"].to_numpy() == source) & has, context)
    if not len(found.places):
        raise ConfigError(f"{run.path} has no context of {context} positions with a row of its own")
    ids = tokens["token_id"].to_numpy(np.int32)
    width = run.rows(hook_point, source[found.places[0, :1]]).shape[1]
    features = Features(
        {
            hook_point: Array2D(shape=(context, width), dtype="float32"),
            "token_ids": Sequence(Value(dtype="int32"), length=context),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        for i, places in enumerate(found.places):
            yield {hook_point: run.rows(hook_point, source[places]).float().numpy(), "token_ids": ids[places]}
            if i % _SHARD == 0 or i + 1 == len(found.places):
                tell(i + 1, len(found.places))

    with new_folder(folder, overwrite=overwrite) as made, tempfile.TemporaryDirectory() as cache:
        # Without a fingerprint `datasets` pickles the generator to make one, progress bar and all.
        named = journal.sha256(run.path / MANIFEST)
        dataset = Dataset.from_generator(rows, features=features, cache_dir=cache, fingerprint=named[:16])
        dataset.save_to_disk(str(made))
    return found
