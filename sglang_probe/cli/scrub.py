"""`sglang-probe scrub`: a copy of a run without personal data."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Pii(StrEnum):
    email = "email"
    phone = "phone"
    ip = "ip"
    card = "card"
    iban = "iban"
    url_credentials = "url_credentials"
    key = "key"


def command(
    run: Annotated[Path, typer.Argument(help="Run directory, or a closed segment of a server (`privacy: ids`).")],
    output: Annotated[Path, typer.Option(help="Folder of the copy; must not exist.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer; default: the model's path in the run.")
    ] = None,
    pii: Annotated[list[Pii] | None, typer.Option(help="A kind to withhold; may be repeated. Default: all.")] = None,
    neighbours: Annotated[int, typer.Option(help="Positions on either side whose rows are withheld too.", min=0)] = 1,
    presidio: Annotated[bool, typer.Option(help="Ask presidio's pattern recognisers too (the extra `pii`).")] = False,
) -> None:
    """Write a copy of a run without personal data: rows can be inverted to text, so positions are withheld.

    Found are e-mail addresses, phone numbers, IP addresses, cards, IBANs, URLs with credentials, and secrets that look
    like keys. Names and addresses are not. A withheld position has no row at any hook point and no token id; the table
    `withheld` says why. Positions whose tokens are not in the run are withheld too: of a server's segment, all those of
    requests that were in flight when it ended. `sglang-probe verify` checks it.

    Example: `sglang-probe scrub runs/traffic --output runs/traffic-scrubbed`
    """
    from sglang_probe.errors import ConfigError
    from sglang_probe.privacy.rule import Withhold
    from sglang_probe.privacy.withhold import UNKNOWN, withhold
    from sglang_probe.run.run import load_run

    opened = load_run(run)
    folder = model or Path(str(opened.manifest.get("model_path") or ""))
    if not folder.is_dir():
        raise ConfigError(f"the tokenizer of {run} is not at hand", fix="give the model's folder by --model")
    rule = Withhold.model_validate(
        {
            "neighbours": neighbours,
            "presidio": presidio,
            **({"pii": [k.value for k in pii]} if pii else {}),
        }
    )
    told = withhold(opened, output, folder, rule)
    for reason, n in sorted(told.items()):
        typer.echo(f"{n}\t{reason}")
    if UNKNOWN in told:
        typer.echo(
            "unknown: their tokens are not in this run (a request that was interrupted, that goes on in the next "
            "segment, or that ended in the one before), so that nobody can say what they hold"
        )
    typer.echo(f"{output}: {sum(told.values())} positions withheld")
