"""What tracing and debugging share: the model, the SAEs and what their latents are set to, recorded prompts, names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.eviction.likelihood import Unembedding, load_unembedding
from sglang_probe.report.figures import visible
from sglang_probe.run.hook_points import RESID_POST, REVIEWED_ARCHITECTURES, parse_hook_point
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.sae import labels
from sglang_probe.sae.attribution import Prompt, Site
from sglang_probe.sae.coded_run import Coded, code_run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.manifest import refuse_other_model
from sglang_probe.sae.sae import SAE
from sglang_probe.stats.distance import row_distance
from sglang_probe.studies.lens.study import checkpoint_of

Array = np.ndarray[Any, Any]
Baseline = Literal["zero", "mean"]
MOST_TOKENS = 1024
"""Longest prompt: gradients keep every layer's activations."""


@dataclass(frozen=True)
class Reader:
    """An SAE, and what is known of its latents from the rows of a run."""

    folder: str
    weights: str
    hook_point: str
    site: Site
    coded: Coded | None
    """Rows that names and means come from; None: there are none."""

    @property
    def layer(self) -> int:
        """Of the residual stream that it reads."""
        return self.site.layer

    def names(self, latents: Sequence[int], vocabulary: Vocabulary, head: Unembedding) -> dict[int, str]:
        """Heuristic labels: the tokens on which a latent fires, and those that its decoder row raises."""
        if not latents:
            return {}
        at = list(dict.fromkeys(latents))
        raised = (self.site.sae.W_dec[at] * head.norm_M) @ head.weight_VM.T
        promoted = raised.topk(3).indices.tolist()
        out = {}
        rules = None
        if self.coded is not None:
            fires = self.coded.codes[:, at].tocsr()
            fires.data = np.ones_like(fires.data)
            rules = labels.token_rules(fires, self.coded.rows["token_id"].to_numpy())
        for i, latent in enumerate(at):
            words = [visible(vocabulary.text(t)) for t in promoted[i]]
            if rules is None:
                out[latent] = "promotes " + ", ".join(f"`{w}`" for w in words)
            else:
                seen = [visible(vocabulary.text(t)) for t in rules.tokens[i]]
                out[latent] = labels.name_of(seen, float(np.nan_to_num(rules.f1[i])), words)
        return out


@dataclass(frozen=True)
class Setup:
    """A run, its checkpoint, and SAEs."""

    run: Run
    folder: Path
    vocabulary: Vocabulary
    readers: Sequence[Reader]
    sinks: Sinks
    baseline: Baseline

    @cached_property
    def head(self) -> Unembedding:
        """Final norm and unembedding."""
        return load_unembedding(self.folder)

    @cached_property
    def model(self) -> Any:
        """The model in float32, without gradients of its weights."""
        return load_model(self.folder)

    @property
    def name(self) -> str:
        """Of the model."""
        return str((self.run.manifest.get("model") or {}).get("name") or self.folder.name)

    def text(self, token: int) -> str:
        """Of a token."""
        return self.vocabulary.text(token)

    def prompt(self, ids: Sequence[int], weights_V: Tensor) -> Prompt:
        """A prompt with the rows of these SAEs; sinks have no nodes."""
        sites = [r.site for r in self.readers]
        bare = Prompt(self.model, ids, weights_V, sites, {})
        position = np.arange(len(ids))
        traced = {}
        for site in sites:
            norm = bare.rows[site.layer].norm(dim=1).numpy()
            traced[site.layer] = torch.from_numpy(~self.sinks.of(position, norm)[0])
        bare.traced = traced
        return bare

    def recorded(self, rid: str) -> pd.Series:
        """A request of the run.

        Raises:
            ConfigError: there is none, its tokens are not known or withheld, or it ran under interventions.
        """
        requests = self.run.requests().set_index("rid")
        if rid not in requests.index:
            raise ConfigError(f"{self.run.path} has no request `{rid}`", fix="`run.requests()` lists them")
        found = requests.loc[rid]
        if found["prompt_ids"] is None or found["output_ids"] is None:
            raise ConfigError(f"token ids of `{rid}` are not known", fix="record with privacy level `ids`")
        if withheld(found):
            raise ConfigError(
                f"tokens of `{rid}` were withheld, and a prompt is traced with all of them",
                fix="choose another request, or the run that this one is a scrubbed copy of",
            )
        if rid in set(self.run.interventions()["rid"]):
            raise ConfigError(
                f"`{rid}` ran under interventions, and what is traced is the model without them",
                fix="choose another request",
            )
        return found

    def agreement(self, rid: str, prompt: Prompt) -> dict[int, float]:
        """By layer: largest relative L2 distance of the run's rows of a request from those computed here; layers that
        the run does not hold are left out."""
        tokens = self.run.tokens()
        some = (tokens["rid"] == rid) & (tokens["position"] < len(prompt.rows[-1])) & (tokens["phase"] != OVERSHOOT)
        mine = tokens[some]
        out = {}
        for reader in self.readers:
            if reader.hook_point not in self.run.hook_points:
                continue
            held = mine[self.run.holds(reader.hook_point, mine["source_row"].to_numpy())]
            if len(held):
                given = self.run.rows(reader.hook_point, held["source_row"].to_numpy())
                ours = prompt.rows[reader.layer][torch.tensor(held["position"].tolist())]
                out[reader.layer] = float(row_distance(given, ours)[0].max())
        return out


def withheld(request: Any, outputs: int | None = None) -> bool:
    """Whether the id of a token of a request was taken out (-1): of its prompt, or of so many of its output."""
    ids = np.concatenate([request.prompt_ids, request.output_ids[:outputs]])
    return bool((ids < 0).any())


def prepare(
    path: Path,
    saes: Sequence[Path],
    *,
    rows: Path | None = None,
    model: Path | None = None,
    baseline: Baseline = "zero",
    sinks: Sinks | None = None,
    most: int = 20_000,
    seed: int = 0,
) -> Setup:
    """Read what a trace needs.

    Args:
        rows: run whose rows give names and means; default: `path`.
        most: of its rows to read.

    Raises:
        ConfigError: two SAEs of one layer, none of a residual stream, or of other weights; the checkpoint is not the
            run's, or means are asked for and there are no rows.
        RunDirectoryError: a run cannot be read.
    """
    run = load_run(path)
    folder = checkpoint_of(run, model)
    named = run if rows is None else load_run(rows)
    if rows is not None:
        checkpoint_of(named, folder)
    sinks = sinks or Sinks()
    readers: list[Reader] = []
    for sae_folder in saes:
        sae = read_sae(sae_folder)
        point = sae.hook_point
        parsed = None if point is None else parse_hook_point(point)
        if point is None or parsed is None or parsed.site != RESID_POST or parsed.layer is None:
            raise ConfigError(f"{sae_folder} is of `{point}`, and what is traced is the residual stream after a layer")
        if parsed.layer in {r.layer for r in readers}:
            raise ConfigError(f"two SAEs read `{point}`", fix="give one for each layer")
        refuse_other_model(sae, [run], str(sae_folder))
        coded = code_run(named, sae, sinks=sinks, most=most, seed=seed) if point in named.hook_points else None
        site = Site.of(parsed.layer, sae)
        if baseline == "mean":
            if coded is None:
                raise ConfigError(
                    f"{named.path} has no rows of `{point}`, whose mean is the baseline",
                    fix="name a run that has them with --rows, or use --baseline zero",
                )
            site = Site.of(parsed.layer, sae, *_means(named, coded, sae))
        readers.append(Reader(Path(sae_folder).name, weights_sha256(Path(sae_folder)), point, site, coded))
    readers.sort(key=lambda r: r.layer)
    return Setup(run, folder, Vocabulary.load(folder), readers, sinks, baseline)


def load_model(folder: Path) -> Any:
    """The model of a checkpoint in float32, by `transformers`.

    Raises:
        UnsupportedError: `transformers` is not installed, or another architecture than the reviewed ones.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as e:
        raise UnsupportedError(
            f"a prediction cannot be traced: {e}", fix="pip install transformers; `--direct` needs none"
        ) from e
    name = (AutoConfig.from_pretrained(folder).architectures or ["unknown"])[0]
    if name not in REVIEWED_ARCHITECTURES:
        raise UnsupportedError(f"tracing {name} has not been reviewed", fix=", ".join(REVIEWED_ARCHITECTURES))
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def _means(run: Run, coded: Coded, sae: SAE) -> tuple[Tensor, Tensor]:
    """Mean activations `[M]` and mean error `[D]` of coded rows."""
    z = torch.from_numpy(np.asarray(coded.codes.mean(0)).ravel()).float()
    rows = coded.rows["row"].to_numpy()
    assert sae.hook_point is not None
    total = torch.zeros(sae.width, dtype=torch.float64)
    for at in range(0, len(rows), 4096):
        total += run.rows(sae.hook_point, rows[at : at + 4096]).double().sum(0)
    # Decoding is affine, so that the mean error is the mean row less the mean code decoded.
    return z, (total / len(rows)).float() - (z @ sae.W_dec + sae.b_dec)
