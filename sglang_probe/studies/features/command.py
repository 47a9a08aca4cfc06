"""`sglang-probe features`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_probe.studies.base import Parameter, Study, bar, option, output_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.studies.features.asked import Asking
    from sglang_probe.studies.features.study import FeaturesResult


class Features(Study):
    """What are the features of a sparse autoencoder about? A dashboard, and what its labels are worth.

    `dashboard.html` is one file with a card for every latent that fires: top examples and some of each quarter of its
    activations, with request and position; rates by kind of token, phase, segment and position; the tokens that its
    direction raises; nearest latents by decoder and by firing. Labels are heuristic (the tokens on which it fires) and
    are scored on texts that they were not found on, beside labels of other latents, of random directions and, with
    `--random-run` and `--random-sae`, of a model that was not trained.

    `--label-with URL` has a model find labels too, through any OpenAI-compatible endpoint. Excerpts of the run's texts
    are sent there. Its answers are kept beside the report: the same command goes on where it was.

    Example: `sglang-probe features runs/mine --sae models/sae-probe-text/seed-0`

    Example: `sglang-probe features runs/mine --sae saes/mine --label-with http://127.0.0.1:30000/v1 --label-most 20`
    """

    name = "features"

    def parameters(self) -> list[Parameter]:
        """The runs, the SAE, which rows, and who labels."""
        run = typer.Argument(help="Run directories with rows of the SAE's hook point, and token ids.")
        sae = typer.Option(help="Folder of an SAE: of `sglang-probe sae train`, SAELens, or Gemma Scope.")
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], run]),
            Parameter("sae", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, sae]),
            option("hook_point", str | None, None, "Where its rows come from, for folders that do not say."),
            option("where", str | None, None, "Which positions: a pandas query over the columns of `run.tokens()`."),
            option("first_positions", int, 1, "Positions at the start of requests that are left out as sinks."),
            option("norm_multiple", float, 10.0, "Leave out rows of more than so many times the median norm; 0: none."),
            option("most", int, 200_000, "Rows to read, whole requests drawn at random from all runs."),
            option("model", Path | None, None, "Folder of the checkpoint; default: the one that the run names."),
            option("random_run", list[Path] | None, None, "Run of `sglang-probe model randomise`, for the null."),
            option("random_sae", Path | None, None, "Its SAE, trained by the same recipe."),
            option("label_with", str | None, None, "Address of an OpenAI-compatible endpoint; ends in /v1 for most."),
            option("label_model", str | None, None, "Model to ask there; default: the one that it lists."),
            option("label_most", int, 50, "Latents to label, drawn at random."),
            option("label_latents", str | None, None, "Label these and no others, e.g. `12,40,7`."),
            option("label_nulls", int, 30, "Random directions, and latents of the random model, to label."),
            option("label_examples", int, 20, "Examples in the question for a label."),
            option("label_windows", int, 10, "Windows of either kind that a label is judged by."),
            option(
                "label_judge", str, "endpoint", "Who judges: `endpoint`, or `words` (those a label names; no asking)."
            ),
            option("label_key", str, "SGLANG_PROBE_LABEL_KEY", "Environment variable with the key, if one is needed."),
            option("label_body", str | None, None, "JSON: further keys of each request; null takes one out."),
            option(
                "label_grammar",
                bool,
                False,
                "Have the server hold answers to their form, by SGLang's `regex`: for small models, which do not.",
            ),
            option("label_at_once", int, 4, "Requests at a time."),
            option("seed", int, 0, "Of all draws."),
            output_option("Folder of the results; default: `features` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[FeaturesResult, Path]:
        """Look at every latent."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks
        from sglang_probe.studies.features.dashboard import write_dashboard
        from sglang_probe.studies.features.study import study

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1:
            raise ConfigError("`--first-positions` and `--norm-multiple` are at least 0, and `--most` at least 1")
        if given["output"] is None and len(given["run"]) > 1:
            raise ConfigError("several runs have no folder in common for the results", fix="give --output")
        folder = given["output"] or given["run"][0] / "features"
        asking = _asking(given, folder)
        sinks = Sinks(given["first_positions"], given["norm_multiple"] or None)
        how = {n: given[n] for n in ("hook_point", "where", "most", "model", "seed", "random_sae")}
        how |= {"random_runs": given["random_run"] or [], "asking": asking}
        with bar(console, "rows, then answers" if asking else "rows") as tell:
            result = study(given["run"], given["sae"], sinks=sinks, **how, tell=tell)
        folder.mkdir(parents=True, exist_ok=True)
        with console.status("writing the dashboard"):
            told = write_dashboard(result, folder)
        result.notes[len(result.notes) :] = told  # type: ignore[index]
        return result, folder

    def page(self, result: FeaturesResult) -> Page:
        """The report."""
        from sglang_probe.studies.features.page import features_page

        return features_page(result)

    def shown(self, result: FeaturesResult) -> Iterator[Table | str]:
        """Scores beside their nulls."""
        from rich.markup import escape

        from sglang_probe.studies.features.dashboard import DASHBOARD
        from sglang_probe.studies.features.page import answer, score_table

        yield escape(answer(result))
        yield score_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
        yield f"{DASHBOARD}, beside the report, has a card for every latent"


def _asking(given: Mapping[str, Any], folder: Path) -> Asking | None:
    """Who is asked for labels; None: nobody."""
    import json

    from sglang_probe.errors import ConfigError

    if given["label_with"] is None:
        if given["label_model"] is not None or given["label_latents"] is not None:
            raise ConfigError("labels by a model need the address of an endpoint", fix="give --label-with URL")
        return None
    from sglang_probe.studies.endpoint import ANSWERS, Endpoint
    from sglang_probe.studies.features.asked import Asking

    least = {"label_most": 2, "label_nulls": 2, "label_examples": 1, "label_windows": 4, "label_at_once": 1}
    for name, value in least.items():
        if given[name] < value:
            raise ConfigError(f"`--{name.replace('_', '-')}` is at least {value}")
    if given["label_judge"] not in ("endpoint", "words"):
        raise ConfigError(f"`--label-judge {given['label_judge']}`: it is `endpoint` or `words`")
    try:
        body = json.loads(given["label_body"] or "{}")
        latents = [int(x) for x in (given["label_latents"] or "").split(",") if x.strip()]
    except ValueError as e:
        raise ConfigError(f"`--label-body` is JSON, and `--label-latents` are numbers with commas: {e}") from e
    if not isinstance(body, dict):
        raise ConfigError("`--label-body` is a JSON object", fix='e.g. {"max_tokens": null}')
    endpoint = Endpoint(
        given["label_with"],
        given["label_model"],
        folder / ANSWERS,
        key_variable=given["label_key"],
        body=body,
        concurrency=given["label_at_once"],
    )
    names = {n: given[f"label_{n}"] for n in ("most", "nulls", "examples", "windows", "judge", "grammar")}
    return Asking(endpoint, latents=latents, **names)
