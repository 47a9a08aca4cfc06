"""An environment of its own for each peer, made by uv from `constraints/peers.txt`. None of it enters the project's."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PINS = ROOT / "constraints" / "peers.txt"
UV = (sys.executable, "-m", "uv")


@dataclass(frozen=True)
class Peer:
    """Something that people would pick."""

    name: str
    script: str
    needs: tuple[str, ...] = ()
    """What is installed; nothing: it runs in this environment."""
    threads: tuple[int, ...] = (1, 2)


OURS = {"sglang-probe": None, "sglang-probe, 2 threads": 2}
"""By name, the `OMP_NUM_THREADS` that it is started with; None: it chooses one thread, as it does for every user."""
PEERS = (
    Peer("transformers, hooks", "hooks.py", ("transformers",)),
    Peer("SAELens ActivationsStore", "saelens_store.py", ("sae-lens",)),
    Peer("nnsight", "nnsight_trace.py", ("nnsight",)),
    Peer("interp-engine, eager", "interp_engine_eager.py", ("interp-engine",)),
)


def python_of(peer: Peer, folder: Path) -> Path:
    """The Python of a peer's environment, which is made if it is not there.

    Raises:
        RuntimeError: it cannot be installed here; the message is the installer's last line.
    """
    place = folder / Path(peer.script).stem
    python, ready = place / "bin" / "python", place / ".ready"
    if not ready.exists():
        print(f"installing {peer.name}", flush=True)
        _run("venv", "--quiet", "--clear", "--python", sys.executable, str(place))
        _run("pip", "install", "--quiet", "--python", str(python), "--constraint", str(PINS), "torch", *peer.needs)
        ready.touch()
    return python


def _run(*arguments: str) -> None:
    done = subprocess.run([*UV, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"uv ended {done.returncode}"
        )
