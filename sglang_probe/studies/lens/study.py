"""The lens on a run: rows of every captured layer through the model's own final norm and unembedding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.axes.position import bins_of
from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.eviction.likelihood import Unembedding, load_unembedding
from sglang_probe.run import journal
from sglang_probe.run.batches import in_parts
from sglang_probe.run.hook_points import EMBED, RESID_POST, parse_hook_point
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.base import Measured
from sglang_probe.studies.lens.measure import Reading, kl, read, settled
from sglang_probe.studies.lens.positions import drawn_positions, next_tokens, window_of
from sglang_probe.studies.lens.translators import Translator, TunedLens

Array = np.ndarray[Any, Any]
EMBEDDING = -1
"""Number of the "layer" before the first."""
_BLOCK = 128
NUMBERS = ["entropy", "kl", "rank", "other_rank", "log_likelihood"]
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class LensResult(Measured):
    """What the layers say."""

    run: str
    model: str
    target: str
    """What ranks are of, in words."""
    final: int | None
    """The model's last layer, if it was captured: what the others are compared with."""
    readings: pd.DataFrame
    """A row for each position and layer: `rid`, `position`, `phase`, `layer`, the numbers of `measure.Reading`,
    `top_token`, `top_text`, `agrees` (with the final layer; null without one)."""
    map: pd.DataFrame
    """The same for the positions of one request that the page shows, and `token`, `next`, `row` (`computed` or
    `gathered`)."""
    shown: str
    """That request."""
    notes: Sequence[str] = field(default_factory=list)
    tuned: str | None = None
    """Folder of the tuned lens; None: the plain one."""

    @property
    def layers(self) -> pd.DataFrame:
        """By layer and phase; phase `all` is every position."""
        return pd.concat(
            [_means(self.readings.assign(phase="all"), "phase"), _means(self.readings, "phase")], ignore_index=True
        )

    @property
    def bands(self) -> pd.DataFrame:
        """By layer and band of positions."""
        position = self.readings["position"]
        bins = bins_of(position.to_numpy())
        ends = position.groupby(bins).agg(["min", "max"])
        names = {b: f"{low} to {high}" if low < high else f"{low}" for b, low, high in ends.itertuples(name=None)}
        return _means(self.readings.assign(positions=[names[b] for b in bins], _bin=bins), "positions", "_bin")

    @property
    def settling(self) -> pd.DataFrame:
        """By layer: positions whose most likely token is the final one from there on, and was not before."""
        if self.final is None:
            return pd.DataFrame(columns=["layer", "positions", "share", "share_so_far"])
        wide = self.readings.pivot(index=["rid", "position"], columns="layer", values="agrees").astype(bool)
        first = settled(wide.to_numpy().T)
        counts = np.bincount(first, minlength=wide.shape[1])[: wide.shape[1]]
        share = counts / len(wide)
        return pd.DataFrame(
            {"layer": wide.columns.to_numpy(), "positions": counts, "share": share, "share_so_far": share.cumsum()}
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "run": self.run,
            "model": self.model,
            "target": self.target,
            "tuned_lens": self.tuned,
            "final_layer": self.final,
            "positions": int(self.readings[["rid", "position"]].drop_duplicates().shape[0]),
            "layers": self.layers.to_dict("records"),
            "settling": self.settling.to_dict("records"),
            "shown": {"rid": self.shown, "positions": sorted(set(map(int, self.map["position"])))},
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table."""
        return {
            "layers": self.layers,
            "positions": self.bands,
            "settling": self.settling,
            "readings": self.readings,
            "map": self.map,
        }


def lens(
    path: Path,
    *,
    model: Path | None = None,
    tuned: Path | None = None,
    target: str | None = None,
    where: str | None = None,
    rid: str | None = None,
    start: int | None = None,
    window: int = 24,
    most: int = 1000,
    seed: int = 0,
    tell: Tell = lambda done, of: None,
) -> LensResult:
    """Read the layers of a run.

    Args:
        model: folder of the checkpoint; default: the one that the run names.
        tuned: folder of a tuned lens (`tune.py`), whose maps are applied to the rows of the layers that it has.
        target: what ranks are of: text of one token, or `#ID`; default: the token that came next.
        where: which positions, a pandas query over the columns of `run.tokens()`.
        rid, start, window: request, first position and number of positions of the map; by default the first request,
            around the end of its prompt.
        most: positions that are measured, drawn at random from computed ones that every layer holds.
        tell: is told how many of how many positions were done.

    Raises:
        ConfigError: there are no such rows, request, token or positions, or the checkpoint is not the run's.
        RunDirectoryError: the run cannot be read.
        ProbeError: the final norm of this architecture was not reviewed.
    """
    run = load_run(path)
    points = captured_layers(run)
    folder = checkpoint_of(run, model)
    unembedding, vocabulary = load_unembedding(folder), Vocabulary.load(folder)
    last = last_layer(run, points)
    translators = None if tuned is None else _translators(run, tuned, unembedding)
    requests = run.requests().set_index("rid")
    wanted = None if target is None else token_of(target, vocabulary)

    def targets(tokens: pd.DataFrame) -> pd.DataFrame:
        return tokens.assign(target=next_tokens(tokens, requests) if wanted is None else wanted)

    notes = _notes(run, points, last)
    if translators is not None:
        notes += _tuned_notes(run, points, last, translators)
    frames = functools.partial(in_parts, run, where, prepare=targets, name="--where")
    chosen = drawn_positions(run, points, frames, most, seed)
    shown = targets(window_of(run, points, requests, rid, start, window))
    total = len(chosen) + len(shown)
    rng = np.random.default_rng([seed, 1])
    other = rng.permutation(chosen["target"].to_numpy())
    read_by = _Lens(points, unembedding, last, {} if translators is None else translators.translators)
    measured = _read(run, read_by, chosen, "row", other, lambda n: tell(n, total))
    other = np.full(len(shown), -1)
    mapped = _read(run, read_by, shown, "source_row", other, lambda n: tell(len(chosen) + n, total))
    mapped = mapped.drop(columns="other_rank")
    for frame in (measured, mapped):
        frame.insert(frame.columns.get_loc("top_token") + 1, "top_text", frame["top_token"].map(vocabulary.text))
    mapped["token"] = np.tile(shown["token_id"].map(vocabulary.text), len(points))
    mapped["next"] = np.tile([vocabulary.text(t) if t >= 0 else "" for t in shown["target"]], len(points))
    own = (shown["row"] >= 0).to_numpy()
    mapped["row"] = np.tile(np.where(own, "computed", "gathered"), len(points))
    said = "the token that came next" if wanted is None else f"`{vocabulary.text(wanted)}` (token {wanted})"
    name = str((run.manifest.get("model") or {}).get("name") or folder.name)
    rid = str(shown["rid"].iloc[0])
    return LensResult(
        run.path.name, name, said, last, measured, mapped, rid, notes, None if tuned is None else tuned.name
    )


def checkpoint_of(run: Run, model: Path | None) -> Path:
    """Folder of the weights that made the rows of a run.

    Raises:
        ConfigError: it is not there, or holds other weights.
    """
    named = model or run.manifest.get("model_path")
    folder = Path(named) if named else None
    if folder is None or not (folder / "config.json").is_file():
        raise ConfigError(f"the model of {run.path} is not at hand: no checkpoint at {folder}", fix="give --model")
    recorded = (run.manifest.get("model") or {}).get("weights_sha256") or {}
    for file, digest in recorded.items():
        if (folder / file).is_file() and journal.sha256(folder / file) != digest:
            raise ConfigError(
                f"{folder / file} holds other weights than those that made the rows of {run.path}",
                fix="give the run's model with --model",
            )
    return folder


def token_of(text: str, vocabulary: Vocabulary) -> int:
    """The token that a user names: its text, or `#ID`.

    Raises:
        ConfigError: there is none; names tokens that begin like it.
    """
    if text.startswith("#") and text[1:].isdigit():
        if int(text[1:]) >= len(vocabulary):
            raise ConfigError(f"there is no token {text[1:]}: the vocabulary has {len(vocabulary):,}")
        return int(text[1:])
    asked = text.encode()
    if asked and asked in vocabulary.pieces:
        return vocabulary.pieces.index(asked)
    near = [p.decode(errors="replace") for p in vocabulary.pieces if p.strip().startswith(asked.strip()) and p][:5]
    hint = f"it begins {', '.join(repr(n) for n in near)}" if near and asked.strip() else "name it by number: `#ID`"
    raise ConfigError(f"{text!r} is not one token of this model", fix=f"{hint}; a space before a word is part of it")


def captured_layers(run: Run) -> dict[int, str]:
    """Captured hook points of the residual stream by layer, in the model's order."""
    found = {}
    for name in run.hook_points:
        point = parse_hook_point(name)
        if point.site in (RESID_POST, EMBED):
            found[EMBEDDING if point.layer is None else point.layer] = name
    if not found or list(found) == [EMBEDDING]:
        raise ConfigError(
            f"{run.path} has no rows of `{RESID_POST}`; it has {', '.join(run.hook_points) or 'none'}",
            fix=f"harvest with `hook_points: [blocks.*.{RESID_POST}]`",
        )
    return dict(sorted(found.items()))


def last_layer(run: Run, points: Mapping[int, str]) -> int | None:
    """Number of the model's last layer, if it was captured."""
    config = run.manifest.get("model_config") or {}
    layers = config.get("num_hidden_layers") or (run.manifest.get("model") or {}).get("layers")
    return layers - 1 if layers and layers - 1 in points else None


def _notes(run: Run, points: Mapping[int, str], last: int | None) -> list[str]:
    notes = [
        "After early layers the residual stream is not in the basis that the unembedding reads: a low rank there says "
        "that the token can be read off, a high one does not say that the layer does not have it."
    ]
    if EMBEDDING in points:
        notes.append("The row `embed` is the input's own embedding; no layer has run.")
    if last is None:
        notes.append(
            "The model's last layer was not captured: there is no final distribution, and KL and agreement are missing."
        )
    if (run.manifest.get("model") or {}).get("weights_sha256") is None:
        notes.append("Whether the checkpoint is the one that made the rows is not known: the run has no hash of it.")
    return notes


@dataclass(frozen=True)
class _Lens:
    """What rows are read by."""

    points: Mapping[int, str]
    unembedding: Unembedding
    last: int | None
    translators: Mapping[int, Translator]

    def logits(self, layer: int, rows_ND: torch.Tensor) -> torch.Tensor:
        """Of rows of a layer, `[N, V]`; the last layer's own are the model's."""
        translate = self.translators.get(layer) if layer != self.last else None
        return self.unembedding.logits(rows_ND if translate is None else translate(rows_ND))


def _translators(run: Run, folder: Path, unembedding: Unembedding) -> TunedLens:
    known = (run.manifest.get("model") or {}).get("weights_sha256")
    return TunedLens.read(folder, width=unembedding.weight_VM.shape[1], weights_sha256=known)


def _tuned_notes(run: Run, points: Mapping[int, str], last: int | None, tuned: TunedLens) -> list[str]:
    notes = []
    plain = [str(i) for i in points if i != last and i not in tuned.translators]
    if plain:
        notes.append(f"The tuned lens has no map of layer {', '.join(plain)}: the plain one is used there.")
    if (tuned.manifest.get("run") or {}).get("manifest_sha256") == journal.sha256(run.path / MANIFEST):
        notes.append(
            "The tuned lens was trained on texts of this run: its KL is lower here than on others. `tuned_lens.json` "
            "names the families that were held out."
        )
    return notes


def _read(
    run: Run, by: _Lens, tokens: pd.DataFrame, which: str, other: Array, tell: Callable[[int], None]
) -> pd.DataFrame:
    """Readings of positions, layer by layer; `which` is the column with the number of the row."""
    points, last, unembedding = by.points, by.last, by.unembedding
    target, rows = tokens["target"].to_numpy(), tokens[which].to_numpy()
    if len(tokens) and target.max() >= len(unembedding.weight_VM):
        raise ProbeError(f"token {target.max()} is beyond the {len(unembedding.weight_VM)} rows of the unembedding")
    parts: dict[int, list[Reading]] = {layer: [] for layer in points}
    with torch.inference_mode():
        for at in range(0, len(tokens), _BLOCK):
            part = slice(at, at + _BLOCK)
            final = None if last is None else unembedding.logits(run.rows(points[last], rows[part]))
            for layer, name in points.items():
                x = None if layer == last else run.rows(name, rows[part])
                logits = final if x is None else by.logits(layer, x)
                assert logits is not None
                found = read(logits, target[part], other[part], final)
                if x is not None and layer in by.translators and final is not None:
                    found = replace(found, plain_kl=kl(unembedding.logits(x), final))
                parts[layer].append(found)
            tell(min(at + _BLOCK, len(tokens)))
    frames = []
    for layer, readings in parts.items():
        frame = tokens[["rid", "position", "phase"]].reset_index(drop=True)
        frame["layer"] = layer
        for name in [*NUMBERS, *(["plain_kl"] if by.translators else [])]:
            frame[name] = np.concatenate([getattr(r, name) for r in readings])
        frame["top_token"] = np.concatenate([r.top for r in readings])
        frame["top_probability"] = np.concatenate([r.probability for r in readings])
        frames.append(frame)
    found = pd.concat(frames, ignore_index=True)
    found["agrees"] = None
    if last is not None:
        final_top = found.loc[found["layer"] == last, "top_token"].to_numpy()
        found["agrees"] = found["top_token"].to_numpy() == np.tile(final_top, len(points))
    return found


def _means(readings: pd.DataFrame, by: str, order: str | None = None) -> pd.DataFrame:
    """Means by layer and group; ranks by their median."""
    grouped = readings.groupby(["layer", *([order] if order else []), by], sort=True, observed=True)
    found = grouped.agg(
        count=("position", "size"),
        entropy=("entropy", "mean"),
        kl=("kl", "mean"),
        agreement=("agrees", lambda a: float("nan") if a.isna().any() else float(a.astype(bool).mean())),
        rank=("rank", "median"),
        other_rank=("other_rank", "median"),
        log_likelihood=("log_likelihood", "mean"),
        **({"plain_kl": ("plain_kl", "mean")} if "plain_kl" in readings else {}),
    ).reset_index()
    return found.drop(columns=[order] if order else [])
