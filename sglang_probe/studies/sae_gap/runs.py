"""The runs of the study: the three of the phase study, and for some of them one for each replacement of the rows.

The replacements are `splice` by three SAEs of a library that is made in between: the one that is studied, and two
whose reconstruction is always the mean row of the human run, or zero.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sglang_probe.ask import Ask
from sglang_probe.errors import ConfigError, RunDirectoryError, WorkloadError
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.prepare import Prepared
from sglang_probe.harvest.prepare import prepare as check
from sglang_probe.harvest.progress import Reporter
from sglang_probe.harvest.steer import check_splice
from sglang_probe.run.hook_points import EMBED, RESID_POST
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae.folder import read_sae, write_sae
from sglang_probe.sae.sae import SAE
from sglang_probe.steer_ask import Steer
from sglang_probe.steering import make
from sglang_probe.steering.config import SteerConfig
from sglang_probe.studies.phase import runs as phase
from sglang_probe.studies.phase.rows import row_indices
from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.studies.sae_gap.config import SaeGapConfig
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request

__all__ = ["prepare", "read", "run"]

SPLICED, RANDOM, MEAN, ZERO = "sae", "random", "mean", "zero"
VARIANTS = (SPLICED, RANDOM, MEAN, ZERO)
"""What takes the place of a row: its reconstruction, the row with a random error of the same length, the mean row of
human text, zero."""
LIBRARY = "library"


def sae_of(config: SaeGapConfig) -> SAE:
    """The SAE, which says where its rows come from.

    Raises:
        ConfigError: it cannot be read, or does not say.
    """
    sae = read_sae(config.sae, hook_point=config.hook_point)
    if sae.hook_point is None:
        raise ConfigError(f"{config.sae} does not say where its rows come from", fix="give `hook_point`")
    return sae


def prepare(config: SaeGapConfig) -> Prepared:
    """Check SAE, model and texts; starts no engine.

    Raises:
        ConfigError: the SAE cannot be read, or is of another width or layer than the model has.
        UnsupportedError: rows cannot be replaced on this machine.
        WorkloadError: fewer than two texts are left.
        ProbeError: as `sglang_probe.harvest.prepare.prepare`.
    """
    sae = sae_of(config)
    prepared = check(config, {"arm": config.arm})
    if config.spliced:
        check_splice()
    width, layers = int(prepared.model.config["hidden_size"]), prepared.model.layers
    if sae.width != width:
        raise ConfigError(f"the SAE reads rows of width {sae.width}, and the model's have {width}")
    assert sae.hook_point is not None
    points = list(dict.fromkeys([EMBED, sae.hook_point, f"blocks.{layers - 1}.{RESID_POST}"]))
    config = config.model_copy(update={"hook_points": points})
    prepared = check(config, {"arm": config.arm}, workload=_texts(prepared, config))
    phase.prepare_texts(prepared, config)
    return prepared


def run(
    prepared: Prepared,
    config: SaeGapConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Run]:
    """Record what is missing; by name. The library is made anew from the human run each time, and is the same if that
    is.

    Raises:
        RunDirectoryError: a run exists and neither `overwrite` nor `resume` was asked; or it is of something else.
        ProbeError: a recording failed.
    """
    clean = phase.run(prepared, config, folder, overwrite=overwrite, resume=resume, reporter=reporter)
    found = {r.path.name: r for replicates in clean.values() for r in replicates}
    if not config.spliced:
        return found
    library = _library(config, clean[HUMAN][0], folder / LIBRARY)
    steered = config.model_copy(
        update={"hook_points": prepared.config.hook_points, "steer": SteerConfig(library=library)}
    )
    again = check(steered, {"arm": config.arm}, workload=prepared.workload)
    texts = phase.texts_of(prepared, config)
    specs = [
        RunSpec(_name(kind, variant), _asking(kind, variant, texts, config, clean), config.arm)
        for kind in config.spliced
        for variant in VARIANTS
    ]
    return found | record(specs, again, folder, asks=("force",), overwrite=overwrite, resume=resume, reporter=reporter)


def read(config: SaeGapConfig, folder: Path) -> dict[str, Run]:
    """The runs that are in `folder`, by name.

    Raises:
        RunDirectoryError: one is missing.
    """
    names = [n for kind in (HUMAN, DECODED, REFORWARD) for n in phase.names_of(kind, config)]
    names += [_name(kind, variant) for kind in config.spliced for variant in VARIANTS]
    return {name: load_run(folder / name) for name in names}


def _name(kind: str, variant: str) -> str:
    return f"{kind}.{variant}"


def _texts(prepared: Prepared, config: SaeGapConfig) -> Workload:
    """The workload without the documents of the SAE's training, and with so many texts as are wanted."""
    known = set()
    for path in config.apart_from:
        known |= set(load_run(path).requests()["family"].dropna())
    length = config.prompt_tokens + config.continuation_tokens
    fitting = [r for r in prepared.workload.requests if len(r.prompt_ids) >= length]
    texts = [r for r in fitting if r.family is None or r.family not in known]
    if len(texts) < 2 and len(fitting) >= 2:
        raise WorkloadError(
            f"{len(fitting) - len(texts)} of {len(fitting)} texts are of documents of `apart_from`",
            fix="take more texts, or others",
        )
    chosen = texts[: config.most_texts]
    return replace(prepared.workload, requests=tuple(replace(r, index=i) for i, r in enumerate(chosen)))


def _library(config: SaeGapConfig, human: Run, folder: Path) -> Path:
    """The three SAEs that rows are replaced by.

    Raises:
        RunDirectoryError: the folder is another library.
    """
    if folder.exists():
        ours = {f"{n}.json" for n in (SPLICED, MEAN, ZERO)}
        if other := sorted(p.name for p in folder.glob("*.*") if p.name not in {*ours, ".lock"}):
            raise RunDirectoryError(
                f"{folder} is in the way: it has {other[0]}, and is no library of this study", fix="give another output"
            )
        shutil.rmtree(folder)
    sae = sae_of(config)
    assert sae.hook_point is not None
    _, where = row_indices(human, config.prompt_tokens, config.prompt_tokens + config.continuation_tokens)
    mean = human.rows(sae.hook_point, where.ravel()).double().mean(0)
    told = {"trust": config.same_model, "hook_point": sae.hook_point}
    make.whole_sae(make.Target(folder, SPLICED), config.sae, human, **told)  # type: ignore[arg-type]
    for name, row in ((MEAN, mean), (ZERO, torch.zeros_like(mean))):
        at = folder / f"{name}-row"
        write_sae(_constant(row, sae.hook_point), at)
        make.whole_sae(make.Target(folder, name), at, human, trust=True)
    return folder


def _constant(row_D: torch.Tensor, hook_point: str) -> SAE:
    """An SAE whose reconstruction is always one row."""
    row = row_D.float()
    none = torch.zeros(len(row), 1)
    return SAE("standard", none, none.T.contiguous(), torch.zeros(1), row, metadata={"hook_name": hook_point})


def _asking(
    kind: str, variant: str, texts: Sequence[Request], config: SaeGapConfig, clean: dict[str, list[Run]]
) -> list[Request]:
    """The requests of a kind of run, with the rows of the continuation replaced, and the same tokens."""
    outputs = {r.index: tuple(r.output_ids) for r in clean[DECODED][0].requests().itertuples()}
    requests = phase.requests_of(kind, texts, config, {DECODED: clean[DECODED][0]})
    asked = []
    for r in requests:
        where: dict[str, Any] = (
            {"phases": ("decode",)}
            if kind == DECODED
            else {"phases": ("prefill",), "prompt_window": (config.prompt_tokens, None)}
        )
        entry: dict[str, Any] = {"vector": SPLICED if variant == RANDOM else variant, "op": "splice", **where}
        if variant == RANDOM:
            entry["random_error"] = r.index
        ask = Ask(
            steer=(Steer.model_validate(entry),),
            force=tuple(int(t) for t in outputs[r.index]) if kind == DECODED else None,
        )
        asked.append(replace(r, sampling_params=ask.into(r.sampling_params)))
    return asked
