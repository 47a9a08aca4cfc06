"""The kept sets that a recording's requests name: checked before anything is served, and kept with the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks.instruments.kept_sets import GRAPHS, NO_GRAPHS
from sglang_probe.engine.platform.environment import accelerator_present
from sglang_probe.engine.platform.limits import PROBE_TORCH
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest.model import Model
from sglang_probe.kept_set import KeptFile
from sglang_probe.run import journal
from sglang_probe.workload.request import Request

KEPT_FILE = "kept.safetensors"
"""In the run directory: the sets that were in force."""
_OF_A_PHASE = ("cuda_graph_config", "cuda_graph_backend_decode", "cuda_graph_backend_prefill")
"""Server arguments that go before `disable_cuda_graph`."""


def check_kept(requests: Iterable[Request], kept: KeptFile | None, model: Model) -> None:
    """Refuse requests whose kept set is not there, or does not fit the request or the model.

    Raises:
        ConfigError: names the first such request.
    """
    for r in requests:
        try:
            check_key(r, kept, model)
        except ConfigError as e:
            raise e.at(r.where) from e


def check_key(request: Request, kept: KeptFile | None, model: Model) -> None:
    """Refuse a request whose kept set is not there, or does not fit the request or the model.

    Args:
        kept: None: the recording has no kept sets.

    Raises:
        ConfigError: names the set.
    """
    key = request.ask.evict
    if key is None:
        return
    if kept is None:
        raise ConfigError(
            f"`evict: {key}`, but the recording has no kept sets", fix="give `kept`, e.g. `record(..., kept=file)`"
        )
    if key not in kept.shapes:
        raise ConfigError(f"`evict: {key}` is not in {kept.path}, which has {len(kept)} others")
    _steps, layers, kv_heads, length = kept.shapes[key]
    if (layers, kv_heads) != (model.layers, model.kv_heads):
        raise ConfigError(
            f"`evict: {key}` is for {layers} layers of {kv_heads} kv heads; the model has {model.layers} of "
            f"{model.kv_heads}"
        )
    if length > len(request.prompt_ids):
        raise ConfigError(f"`evict: {key}` is for {length} positions and the prompt has {len(request.prompt_ids)}")


def check_backend(server: dict[str, Any], *, simulated: bool = False) -> None:
    """Refuse server arguments under which nothing attends to kept sets.

    Args:
        simulated: the probe's own tests take the path to an accelerator on a CPU.

    Raises:
        UnsupportedError: names the argument.
    """
    given_back = [n for n in _OF_A_PHASE if server.get(n) not in (None, "disabled")]
    if accelerator_present() and (given_back or not server.get("disable_cuda_graph")):
        raise UnsupportedError(GRAPHS + "".join(f" (`{name}`)" for name in given_back), fix=NO_GRAPHS)
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        if not (simulated or accelerator_present()) and server.get(name) not in (None, PROBE_TORCH):
            raise UnsupportedError(
                f"on a CPU `{name}: {server[name]}` knows nothing of kept sets",
                fix=f"set `attention_backend: {PROBE_TORCH}` or nothing",
            )
    if server.get("tp_size", 1) != 1:
        raise UnsupportedError("under tensor parallelism each rank has a share of the kv heads", fix="set `tp_size: 1`")


def keep_with_run(path: Path, kept: KeptFile, requests: Iterable[Request]) -> dict[str, Any]:
    """Copy the sets that `requests` name into the run directory; what the manifest says of it."""
    keys = _keys(requests)
    kept.write_subset(path / KEPT_FILE, keys)
    return {"file": KEPT_FILE, "sha256": journal.sha256(path / KEPT_FILE), "sets": len(keys), "frees_memory": False}


def digest_of_kept(kept: KeptFile, requests: Iterable[Request]) -> str:
    """SHA-256 of the sets that `requests` name."""
    return kept.digest(_keys(requests))


def _keys(requests: Iterable[Request]) -> set[str]:
    return {r.ask.evict for r in requests if r.ask.evict is not None}
