"""What is known of each latent of an SAE: where it fires, on what, with what, and what its label is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.run.run import load_run
from sglang_probe.sae import labels, neighbours
from sglang_probe.sae.coded_run import Coded, code_runs
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.manifest import refuse_other_model
from sglang_probe.studies.base import Measured
from sglang_probe.studies.features import prompts
from sglang_probe.studies.features.arms import DIRECTIONS, OWN, RANDOM_MODEL, judged, random_directions, random_model
from sglang_probe.studies.features.asked import Asking, ask
from sglang_probe.studies.features.tables import (
    Promoted,
    examples_table,
    latents_table,
    near_table,
    promote,
    rates_table,
)
from sglang_probe.studies.lens.study import checkpoint_of

Array = np.ndarray[Any, Any]
HEURISTIC = "token-set rule"
_SAME = "token-set rule, the same latents"


@dataclass(frozen=True)
class FeaturesResult(Measured):
    """What was found of an SAE's latents on some runs."""

    sae: str
    weights: str
    """SHA-256 of its weights."""
    hook_point: str
    runs: list[str]
    model: str
    coded: Coded
    vocabulary: Vocabulary
    latents: pd.DataFrame
    """A row for each latent: `latent`, `label` (heuristic), `rate`, `mean`, `most`, `texts`, `f1`, `precision`,
    `recall`, `detection`, `fuzzing`, each score's `_shuffled`, `windows`, `cluster`."""
    rules: labels.Rules
    rates: pd.DataFrame
    """`latent`, `axis` (`token`, `phase`, `segment`, `position`), `class`, `rate`."""
    near: pd.DataFrame
    """`latent`, `by` (`decoder`, `firing`), `neighbour`, `value`."""
    promoted: Promoted | None
    examples: pd.DataFrame
    """`latent`, `bin` (`top`, or `1` to `4`, the weakest quarter first), `run`, `rid`, `position`, `flat`,
    `activation`, `row` (`computed`; a row that others were served from is counted in `reused`), `reused`."""
    null: pd.DataFrame
    """Scores of random directions that fire as often: `latent` (whose rate it has), `f1`, `detection`, `fuzzing`."""
    random_model: pd.DataFrame | None
    """Likewise, of the latents of a dictionary of a model that was not trained; None: none was given."""
    asked: pd.DataFrame | None
    """Labels by a model that was asked, columns as `asked.COLUMNS`; None: none was asked."""
    asked_of: dict[str, Any]
    """Which model, the questions and their hashes; empty: none was asked."""
    seconds: dict[str, float]
    """By step: `coding`, `latents`, `nulls`, `asking`."""
    notes: Sequence[str] = field(default_factory=list)

    @property
    def judge(self) -> str:
        """Who labelled, beside the token-set rule."""
        return str(self.asked_of.get("model", ""))

    @property
    def scores(self) -> pd.DataFrame:
        """Means of each score over latents, beside its nulls: `label` (who gave it), `score`, `labels`,
        `other_latents`, `random_directions`, `random_model`, `latents`."""
        held = {OWN: self.latents, DIRECTIONS: self.null, RANDOM_MODEL: self.random_model}
        found = _means(HEURISTIC, held)
        if self.asked is not None:
            by_arm = dict(iter(self.asked.groupby("arm")))
            same = self.latents["latent"].isin(by_arm[OWN]["latent"])
            found += _means(_SAME, {**held, OWN: self.latents[same]})
            found += _means(self.judge, by_arm)
        return pd.DataFrame(found)

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        alive = self.latents["rate"] > 0
        return {
            "sae": self.sae,
            "weights_sha256": self.weights,
            "hook_point": self.hook_point,
            "runs": self.runs,
            "model": self.model,
            "rows": len(self.coded),
            "texts": len(self.coded.texts),
            "left_out": self.coded.left_out,
            "latents": len(self.latents),
            "alive": int(alive.sum()),
            "named_by_few_tokens": int((self.latents["f1"] >= 0.5).sum()),
            "clusters": int(self.latents["cluster"].max() + 1),
            "scores": self.scores.to_dict("records"),
            "labels": "heuristic: the token-set rule, no model",
            "labels_asked": self.asked_of or None,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "coding_seconds_per_million_rows": round(1e6 * self.seconds["coding"] / len(self.coded), 1),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table."""
        held = {
            "latents": self.latents,
            "rates": self.rates,
            "neighbours": self.near,
            "examples": self.examples.drop(columns="flat"),
            "scores": self.scores,
            "random_directions": self.null,
        }
        more = {"random_model": self.random_model, "labels_asked": self.asked}
        return held | {name: frame for name, frame in more.items() if frame is not None}


def study(
    paths: Path | Sequence[Path],
    folder: Path,
    *,
    hook_point: str | None = None,
    model: Path | None = None,
    where: str | None = None,
    sinks: Sinks | None = None,
    most: int = 200_000,
    per_bin: int = 5,
    random_runs: Sequence[Path] = (),
    random_sae: Path | None = None,
    asking: Asking | None = None,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> FeaturesResult:
    """Look at every latent.

    Args:
        paths: of the runs.
        folder: of the SAE.
        most: rows to read, whole texts drawn at random from all runs.
        per_bin: examples of each quarter of the activations.
        random_runs: runs of a model that was not trained, for the null; and the SAE of it.
        asking: asks a model for labels.

    Raises:
        ConfigError: the SAE or checkpoint cannot be read or is of other weights than a run; no rows are left; the
            endpoint refuses.
        RunDirectoryError: a run cannot be read, or lacks the hook point.
    """
    runs = [load_run(p) for p in ([paths] if isinstance(paths, Path) else paths)]
    sae = read_sae(folder, hook_point=hook_point)
    for run in runs:
        refuse_other_model(sae, [run], str(folder))
    if bool(random_runs) != (random_sae is not None):
        raise ConfigError(
            "the null of a random model needs its runs and its SAE",
            fix="give --random-run and --random-sae, or neither",
        )
    checkpoint = checkpoint_of(runs[0], model)
    vocabulary = Vocabulary.load(checkpoint)
    clock = _Clock()
    how = {"where": where, "sinks": sinks, "most": most}
    coded = code_runs(runs, sae, **how, seed=seed, tell=tell)  # type: ignore[arg-type]
    clock.tick("coding")
    if not coded.codes.nnz:
        raise ConfigError(f"no latent of {folder} fires in the {len(coded)} rows", fix="are they of its hook point?")
    notes = []
    try:
        promoted = promote(sae, checkpoint)
    except ProbeError as e:
        promoted = None
        notes.append(f"tokens that latents promote are missing: {e}")
    own = judged(OWN, coded, coded.codes, seed)
    if coded.texts["family"].nunique() < 2:
        notes.append("there is one text: labels were found, and nothing is left to judge them by")
    fires = labels.fired(coded.codes)
    latents = latents_table(coded, fires, own.rules, own.scores, vocabulary, promoted)
    latents["cluster"] = neighbours.clusters(fires)
    near, examples, rates = (
        near_table(sae, fires),
        examples_table(coded, per_bin, seed),
        rates_table(coded, fires, vocabulary),
    )
    clock.tick("latents")
    arms, null = [own], pd.DataFrame(columns=["latent", "f1", "detection", "fuzzing"])
    if (drawn := random_directions(runs, sae, own, seed)) is not None:
        arms.append(drawn[0])
        null = drawn[0].table.assign(latent=drawn[1])
    random_table = None
    if random_sae is not None:
        random, told = random_model(random_runs, random_sae, runs, sae, seed=seed, tell=tell, **how)
        arms.append(random)
        random_table = random.table
        notes += told
    clock.tick("nulls")
    asked, asked_of = None, {}
    if asking is not None:
        asked = ask(asking, arms, vocabulary, seed, tell)
        asked_of = _asked_of(asking, asked)
        notes += _notes_of(asking, asked, random_table is not None)
        clock.tick("asking")
    return FeaturesResult(
        sae=folder.name,
        weights=weights_sha256(folder),
        hook_point=str(sae.hook_point),
        runs=coded.runs,
        model=str((runs[0].manifest.get("model") or {}).get("name") or checkpoint.name),
        coded=coded,
        vocabulary=vocabulary,
        latents=latents,
        rules=own.rules,
        rates=rates,
        near=near,
        promoted=promoted,
        examples=examples,
        null=null,
        random_model=random_table,
        asked=asked,
        asked_of=asked_of,
        seconds=clock.seconds,
        notes=notes,
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def tick(self, step: str) -> None:
        now = time.monotonic()
        self.seconds[step], self._since = now - self._since, now


def _means(label: str, held: Mapping[str, pd.DataFrame | None]) -> list[dict[str, Any]]:
    found = []
    for name in ("detection", "fuzzing"):
        own = held[OWN][[name, f"{name}_shuffled"]].dropna()  # type: ignore[index]
        line: dict[str, Any] = {"label": label, "score": name, OWN: own[name].mean()}
        line["other_latents"] = own[f"{name}_shuffled"].mean()
        for arm in (DIRECTIONS, RANDOM_MODEL):
            frame = held.get(arm)
            line[arm] = float("nan") if frame is None else frame[name].mean()
        found.append({**line, "latents": len(own)})
    return found


def _asked_of(asking: Asking, asked: pd.DataFrame) -> dict[str, Any]:
    served = asking.endpoint.served
    judged_by = {"detection", "fuzzing"} if asking.judge == "endpoint" else set()
    return {
        "model": served.server["id"],
        "host": served.host,
        "weights_sha256": served.weights_sha256,
        "server": served.server,
        "judge": asking.judge,
        "held_to_a_form": asking.grammar,
        "latents": int((asked["arm"] == OWN).sum()),
        "without_label": int(asked["label"].isna().sum()),
        "labels_alike": _alike(asked),
        "questions": int(asked["questions"].sum()),
        "answered": int(asked["answered"].sum()),
        "alike": int(asked["alike"].sum()),
        "prompts": {n: p for n, p in prompts.PROMPTS.items() if n == "label" or n in judged_by},
        "prompts_sha256": {n: prompts.sha256(n) for n in prompts.PROMPTS if n == "label" or n in judged_by},
    }


def _alike(asked: pd.DataFrame) -> int:
    """How many latents have the commonest label."""
    labels_ = asked.loc[asked["arm"] == OWN, "label"].dropna().str.casefold()
    return int(labels_.value_counts().max()) if len(labels_) else 0


def _notes_of(asking: Asking, asked: pd.DataFrame, has_random: bool) -> list[str]:
    notes = []
    if bare := int(asked["label"].isna().sum()):
        notes.append(f"{bare} of {len(asked)} answers have no line `LABEL: ...`: these latents have no label")
    own = int((asked["arm"] == OWN).sum())
    if _alike(asked) > max(2, own / 2):
        notes.append(f"{_alike(asked)} of {own} latents have the same label: it says nothing of any of them")
    total, answered = int(asked["questions"].sum()), int(asked["answered"].sum())
    if answered < total:
        notes.append(
            f"{total - answered} of {total} verdicts are no list of zeros and ones, and are left out of the scores"
        )
    if answered and (alike := int(asked["alike"].sum())) > answered / 2:
        notes.append(
            f"{alike} of {answered} verdicts are the same list, whatever the texts: such a judge reads nothing, and "
            "what it says of labels is worth nothing"
        )
    if not has_random:
        notes.append("no random model stands beside the labels: --random-run and --random-sae give one")
    if asking.endpoint.served.weights_sha256 is None:
        notes.append("the weights of the model that was asked are not at hand: its name is all that is known of it")
    return notes
