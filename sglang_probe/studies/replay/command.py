"""`sglang-probe replay`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_probe.studies.base import Parameter, Study, option, output_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.studies.replay.study import ReplayResult


class Replay(Study):
    """Was a run served under the interventions that a manifest of features states? Serve its requests again and see.

    The requests' own tokens are decoded by force, under the features, directions, operations and strengths of the
    manifest, at the positions that the run's ledger has. The stored rows are compared with those of the replay, and
    the distance between two replays in two orders is the floor. Gates must be decided alike.
    Exit code 1 if the run is something else; 2 if it cannot be replayed, above all because run or model have other
    weights than the manifest.

    Example: `sglang-probe replay features.json runs/audited --library vectors`
    """

    name = "replay"

    def parameters(self) -> list[Parameter]:
        """The manifest, the run, and where library and model are."""
        manifest = typer.Argument(help="The file `features.json`.")
        run = typer.Argument(help="Run directory, with token ids and rows, whose requests were intervened on.")
        library = typer.Option(help="Folder of the vectors that the run was steered by.")
        return [
            Parameter("manifest", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, manifest]),
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            Parameter("library", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, library]),
            option(
                "sae",
                Path | None,
                None,
                "Folder of the manifest's SAE, for a run whose server clamps features.",
            ),
            option("model", str | None, None, "Where the model is; default: where the run says."),
            option("requests", int, 32, "How many at most; half of them plain ones, if there are."),
            option("overwrite", bool, False, "Delete an earlier replay in the folder, and serve again."),
            output_option("Folder of the replay; default: `runs/replay/<name of the run>`."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[ReplayResult, Path]:
        """Serve again, and compare."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.harvest.directory import hold_directory
        from sglang_probe.harvest.progress import Terminal
        from sglang_probe.run.run import load_run
        from sglang_probe.steering.features import read_features
        from sglang_probe.studies.replay import runs
        from sglang_probe.studies.replay.study import study_replay

        if given["requests"] < 1:
            raise ConfigError("`--requests` is at least 1")
        terminal = Terminal(console)
        stored = load_run(given["run"])
        folder = given["output"] or Path("runs") / "replay" / stored.path.name
        with hold_directory(folder):
            with terminal.stage("checking manifest, run and library"):
                prepared = runs.prepare(
                    read_features(given["manifest"]),
                    stored,
                    given["library"],
                    folder,
                    sae=given["sae"],
                    model=given["model"],
                    requests=given["requests"],
                )
            found = runs.run(prepared, folder, overwrite=given["overwrite"], reporter=terminal)
        with console.status("comparing") as status:
            return study_replay(prepared, found, tell=status.update), folder

    def page(self, result: ReplayResult) -> Page:
        """The report."""
        from sglang_probe.studies.replay.page import replay_page

        return replay_page(result)

    def shown(self, result: ReplayResult) -> Iterator[Table | str]:
        """The answer, and distances."""
        from rich.markup import escape

        from sglang_probe.studies.replay.page import answer, rows_table

        yield escape(answer(result).replace("`", ""))
        yield rows_table(result)
