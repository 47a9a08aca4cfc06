"""Samples as trainers of EAGLE drafters read them: `hidden_states/hs_<i>.safetensors` beside an Arrow dataset.

The layout is that of vLLM's speculators (`src/speculators/train/data.py`, `ArrowDataset`; 0.9): a `datasets` folder
with `input_ids`, `loss_mask` and `seq_len`, and of sample i a file with `hidden_states` `[n, layers, width]` and
`token_ids` `[n]`. The trainer takes all layers but the last as the drafter's input, and makes its targets of the last
by the verifier's final norm and unembedding: so the last one is the residual stream after the model's last layer,
*before* that norm. Its layer id k (`--target-layer-ids`) is what layer k reads: our `blocks.<k - 1>.hook_resid_post`.

Every sample is written whole: this is the naive storage that `Run.samples` does without.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.export.folder import new_folder
from sglang_probe.run.hook_points import RESID_POST, parse_hook_point
from sglang_probe.run.run import Run
from sglang_probe.run.samples import LEARNED, Samples

STATES = "hidden_states"


def export_eagle(
    run: Run,
    folder: Path,
    *,
    hook_points: Sequence[str] | None = None,
    learned: Sequence[str] = LEARNED,
    overwrite: bool = False,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Samples:
    """Write a run, one sample in memory at a time; returns the samples, whose `left_out` says which requests are not
    whole, or have token ids that were withheld or not recorded.

    Args:
        hook_points: residual streams in the order of the layers; default: all that were captured.
        learned: segments whose tokens the loss is of (`loss_mask`).

    Raises:
        ConfigError: the folder is there, the hook points are no residual streams that end with the model's last, or
            the package `datasets` is missing.
        RunDirectoryError: the run lacks a hook point, or no request of it is whole and has its token ids.
    """
    try:
        from datasets import Dataset, Features, List, Value
    except ImportError as e:
        raise ConfigError(
            f"speculators reads folders of the package `datasets`: {e}", fix="pip install 'sglang-probe[datasets]'"
        ) from e
    import torch
    from safetensors.torch import save_file

    points = _checked(run, hook_points)
    samples = Samples(run, points, learned=learned, ids=True)
    with new_folder(folder, overwrite=overwrite) as made:
        kinds = {"input_ids": List(Value("int64")), "loss_mask": List(Value("bool")), "seq_len": Value("int64")}
        cache = made / ".cache"
        texts = Dataset.from_generator(
            _texts, features=Features(kinds), cache_dir=str(cache), gen_kwargs={"samples": samples}, fingerprint="eagle"
        )
        texts.with_format("torch").save_to_disk(str(made))
        shutil.rmtree(cache)
        (made / STATES).mkdir()
        for i in range(len(samples)):
            sample = samples[i]
            states = torch.stack([sample[p] for p in points], dim=1)
            save_file({STATES: states, "token_ids": sample["input_ids"]}, made / STATES / f"hs_{i}.safetensors")
            tell(i + 1, len(samples))
        told = {"hook_points": points, "target_layer_ids": layer_ids(points), "rids": samples.rids}
        (made / "samples.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return samples


def _texts(samples: Samples) -> Iterator[dict[str, Any]]:
    for i in range(len(samples)):
        text = samples.tokens(i)
        told = {name: text[name].numpy() for name in ("input_ids", "loss_mask")}
        yield {**told, "seq_len": len(text["input_ids"])}


def layer_ids(points: Sequence[str]) -> list[int]:
    """What speculators calls these residual streams (`--target-layer-ids`): the layer that reads each."""
    return [int(parse_hook_point(p).layer or 0) + 1 for p in points]


def _checked(run: Run, hook_points: Sequence[str] | None) -> list[str]:
    points = list(hook_points or (p for p in run.hook_points if parse_hook_point(p).site == RESID_POST))
    if wrong := [p for p in points if parse_hook_point(p).site != RESID_POST]:
        raise ConfigError(
            f"{wrong[0]} is no residual stream after a layer", fix="give `blocks.<layer>.hook_resid_post`"
        )
    ids = layer_ids(points)
    if len(points) < 2 or ids != sorted(set(ids)):
        raise ConfigError(
            f"a drafter reads residual streams of one layer or more in their order, and then the last; not {points}",
            fix="record `hook_points: [blocks.2.hook_resid_post, ..., blocks.<last>.hook_resid_post]`",
        )
    layers = (run.manifest.get("model_config") or {}).get("num_hidden_layers")
    if layers is not None and ids[-1] != layers:
        raise ConfigError(
            f"{points[-1]} is not after the last of the model's {layers} layers, and the targets are made of that",
            fix=f"record blocks.{layers - 1}.hook_resid_post too, and name it last",
        )
    return points
