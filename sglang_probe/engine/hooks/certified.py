"""Whether rows, telemetry and interventions are proved where this engine runs: the certificate of `sglang-probe prove`.

Asked once, when the scheduler is built: then it is known what SGLang chose (device, dtype, attention backend, graphs).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.engine.hooks import inventory
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.run import certificate
from sglang_probe.run.hook_points import ATTENTION, RESID_POST, SCORES

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

_TELEMETRY = tuple(site for site in ATTENTION if "rot" in site)


def certified(config: EngineProbeConfig, device: str, in_force: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The certificate under which a recording is made, as manifests cite it; None: it needs none.

    Args:
        device: the model's.
        in_force: the server arguments as SGLang resolved them.

    Raises:
        UnsupportedError: nothing proves it; the command that would is named.
    """
    of_config = {"telemetry": config.telemetry is not None, "steer": config.steer is not None}
    kinds = kinds_needed(config.hook_points, **of_config, evict="evict" in config.asks)
    if device == "cpu" or config.proving or not kinds:
        return None
    resolved = in_force()
    model_path = str(resolved["model_path"])
    subject = subject_in_force(resolved) | certificate.model_facts(_folder(model_path))
    for name in ("graphs", "prefill_graphs"):
        if not subject[name]:
            del subject[name]  # a proof with graphs covers eager forwards too
    return cite(config.certificate, subject, kinds, model_path, prove_arguments(resolved))


def kinds_needed(hook_points: list[str], *, telemetry: bool, steer: bool, evict: bool = False) -> set[str]:
    """Kinds of hook points that have to be proved for what is asked. Scores are taken where residuals are, queries of
    telemetry where those of rows are, and interventions change what residuals are rows of."""
    kinds = {RESID_POST if kind == SCORES else kind for kind in certificate.kinds_of(hook_points)}
    kinds |= {certificate.KEPT_SETS} if evict else set()
    return kinds | (set(_TELEMETRY) if telemetry else set()) | ({RESID_POST} if steer else set())


def subject_in_force(resolved: dict[str, Any]) -> dict[str, Any]:
    """What a certificate must be of, apart from the model.

    Args:
        resolved: server arguments in force (`engine/hooks/resolved.py`).
    """
    device = resolved.get("device_name")
    graphs = resolved.get("cuda_graphs") or {}
    return {
        **subject_installed(),
        "device": device or "cpu",
        "dtype": resolved.get("dtype"),
        "attention_backend": resolved.get("attention_backend"),
        "graphs": bool(device) and graphs.get("decode", "disabled") != "disabled",
        "prefill_graphs": bool(device) and graphs.get("prefill", "disabled") != "disabled",
        "tp_size": int(resolved.get("tp_size") or 1),
    }


def subject_installed() -> dict[str, Any]:
    """What of it is known before an engine starts."""
    reviewed = inventory.load_inventory()
    return {"sglang": reviewed.sglang, "inventory": inventory.digest(reviewed), **certificate.versions()}


def cite(
    named: Path | str, subject: dict[str, Any], kinds: set[str], model: str, server: dict[str, Any]
) -> dict[str, Any]:
    """A certificate that covers a subject, as manifests cite it.

    Args:
        named: its file, or `auto`.
        model, server: for the command that would make one.

    Raises:
        UnsupportedError: there is none.
    """
    path, why = (None, "") if named != "auto" else certificate.find(subject, kinds)
    if named != "auto":
        try:
            missed = certificate.misses(certificate.read_certificate(Path(named)), subject, kinds)
            path, why = (Path(named), "") if missed is None else (None, f"{named}: {missed}")
        except ConfigError as e:
            why = e.message
    if path is None:
        command = certificate.command(model, server, kept_sets=certificate.KEPT_SETS in kinds)
        raise UnsupportedError(
            "nothing proves that rows, telemetry, interventions and kept sets are right here: "
            f"no certificate covers it ({why})",
            fix=f"run `{command}` on this machine (about two minutes), "
            "or record the ledger alone (`hook_points: []`, no `telemetry`, no `steer`, no kept sets)",
        )
    found = certificate.read_certificate(path)
    return {"file": path.name, "sha256": found["sha256"], "time": found["time"]}


def prove_arguments(resolved: dict[str, Any]) -> dict[str, Any]:
    """Server arguments of a proof of the engine that is running."""
    arguments = {"attention_backend": resolved.get("attention_backend"), "dtype": resolved.get("dtype")}
    if int(resolved.get("tp_size") or 1) > 1:
        arguments["tp_size"] = resolved["tp_size"]
    if resolved.get("disable_cuda_graph"):
        arguments["disable_cuda_graph"] = True
    elif (resolved.get("cuda_graphs") or {}).get("prefill") == "disabled":
        arguments["disable_prefill_cuda_graph"] = True
    if " " in str(arguments["attention_backend"]):  # one for prefill and another for decode
        prefill, decode = (part.split(" ")[0] for part in str(arguments.pop("attention_backend")).split(", "))
        arguments |= {"prefill_attention_backend": prefill, "decode_attention_backend": decode}
    return arguments


def _folder(model_path: str) -> Path | None:
    """Where the files of a model lie: a folder, or what the hub's client has of it; None: it is not known."""
    if Path(model_path).is_dir():
        return Path(model_path)
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_path, "config.json")
    return Path(found).parent if isinstance(found, str) else None
