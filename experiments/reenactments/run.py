"""Public reports of lost or wrong reuse, acted out on real servers here, and what the product says of each.

    python experiments/reenactments/run.py [--folder runs/reenactments] [--only NAME] [--report-only]

Each situation sets up what a report tells, on stock SGLang with a small model on a CPU, asks `why`, `what-if`, `gate`
or `audit`, follows the advice, and measures again. What we planted, and what of a report cannot run here, stands beside
it. Situations that are done are kept in the folder (`NAME.json`). Writes `report.html` and `summary.json` there, and
copies the summary beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from page import report
from situations import SITUATIONS

from sglang_probe.report.page import write

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "reenactments")
    parser.add_argument("--only", choices=list(SITUATIONS), help="act out this one alone, if it is not done")
    parser.add_argument("--report-only", action="store_true", help="read what is there, and draw the report again")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for n, name in enumerate(SITUATIONS, 1):
        kept = args.folder / f"{name}.json"
        wanted = not args.report_only and args.only in (None, name)
        if not kept.exists() and wanted:
            act(name, args.folder, f"[{n} of {len(SITUATIONS)}]")
        if kept.exists():
            found[name] = json.loads(kept.read_text())
    (args.folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.only is None and not args.report_only:
        shutil.copyfile(args.folder / "summary.json", HERE / "summary.json")
    write(report(found), args.folder / "report.html")
    sys.stdout.write(f"{args.folder / 'report.html'}\n")


def act(name: str, folder: Path, where: str) -> None:
    """Act out a situation, and those that share its servers."""
    situation, began = SITUATIONS[name], time.monotonic()
    sys.stderr.write(f"{where} {situation.name} ...\n")
    own = folder / name
    own.mkdir(exist_ok=True)
    told = situation.act(own)
    several = {k: v for k, v in told.items() if k in SITUATIONS}
    for of, result in (several or {name: told}).items():
        (folder / f"{of}.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stderr.write(f"{where} {', '.join(several) or name}: {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
