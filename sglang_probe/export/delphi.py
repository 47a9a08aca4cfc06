"""Codes as delphi's latent cache (`delphi/latents/cache.py`, `loader.py`): what its explainers and scorers start from.

<hook point>/<first>_<last>.safetensors    locations [n, 3] (context, position, latent - first), activations [n]
                                           float16, tokens [contexts, length]
<hook point>/config.json                   context length, model, where the texts come from
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sglang_probe.export.contexts import Contexts, cut, require_contexts
from sglang_probe.export.folder import new_folder
from sglang_probe.run.run import load_run
from sglang_probe.sae.coded_run import Coded, code_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.manifest import refuse_other_model

_LEAST = 1e-5
"""Smaller activations are none (delphi's own rule)."""


def code_and_export(
    run: Path,
    sae: Path,
    folder: Path,
    *,
    model: str | None = None,
    most: int = 200_000,
    tell: Callable[[int, int], None] = lambda done, of: None,
    **how: Any,
) -> Contexts:
    """Encode the rows of a run and write the cache: `export_delphi` takes the rest.

    Raises:
        ConfigError: as `export_delphi`; or the SAE cannot be read, or is of other weights than the run.
        RunDirectoryError: the run cannot be read, or lacks the hook point.
    """
    opened, read = load_run(run), read_sae(sae)
    refuse_other_model(read, [opened], str(sae))
    coded = code_run(opened, read, most=most, tell=tell)
    told = model or opened.manifest.get("model_path") or (opened.manifest.get("model") or {}).get("name") or ""
    return export_delphi(coded, folder, hook_point=str(read.hook_point), model=str(told), **how)


def export_delphi(
    coded: Coded,
    folder: Path,
    *,
    hook_point: str,
    model: str,
    context: int = 64,
    splits: int = 5,
    overwrite: bool = False,
) -> Contexts:
    """Write the cache. A position without a row (a sink, or none captured) has no activation.

    Args:
        context: tokens of a context.
        splits: files that the latents are spread over.

    Raises:
        ConfigError: the folder is there, or no text is as long as a context.
    """
    everywhere = np.ones(len(coded.ids), dtype=bool)
    own = (coded.row_of >= 0) & ~coded.gathered
    found = cut(coded.text, everywhere, own, context)
    require_contexts(len(found.places) + found.repeated, context)
    rows = coded.row_of[found.places]
    c, p = np.nonzero(rows >= 0)
    codes = coded.codes[rows[c, p]].tocoo()
    at, latent = codes.coords
    strong = codes.data > _LEAST
    at, latent, value = at[strong], latent[strong], codes.data[strong]
    locations = np.stack([c[at], p[at], latent], axis=1)
    width = coded.codes.shape[1]
    edges = np.linspace(0, width, min(splits, width) + 1).astype(np.int64)
    with new_folder(folder, overwrite=overwrite) as made:
        place = made / hook_point
        place.mkdir()
        for first, end in pairwise(edges.tolist()):
            inside = (latent >= first) & (latent < end)
            part = locations[inside] - np.array([0, 0, first])
            small = part.size == 0 or part.max() < 2**16
            data = {
                "locations": np.ascontiguousarray(part.astype(np.uint16 if small else np.uint32)),
                "activations": value[inside].astype(np.float16),
                "tokens": coded.ids[found.places],
            }
            save_file(data, place / f"{first}_{end - 1}.safetensors")
        config = {
            "dataset_repo": "sglang-probe",
            "dataset_split": "train",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": 1,
            # Its loader has asked for either name.
            "ctx_len": context,
            "cache_ctx_len": context,
            "n_tokens": int(found.places.size),
            "n_splits": len(edges) - 1,
            "model_name": model,
        }
        (place / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return found
