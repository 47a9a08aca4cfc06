"""Interventions of a recording: its library and what its requests ask of it, checked before an engine starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sglang_probe.ask import WHERE
from sglang_probe.engine.platform.environment import accelerator_present
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest.model import Model
from sglang_probe.policy.arm import Arm
from sglang_probe.run.weights import weight_hash
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.config import SteerConfig
from sglang_probe.steering.library import Library
from sglang_probe.steering.resolve import spec_of


def open_library(config: SteerConfig | None, model: Model) -> Library | None:
    """The library of a recording; None: it has none.

    Raises:
        ConfigError: it cannot be read, a vector is of another model, or the deployment asks what one cannot do.
    """
    if config is None:
        return None
    library = Library.open(config.library)
    library.check(
        width=int(model.config["hidden_size"]),
        layers=model.layers,
        weight_hash=weight_hash(model.identity["weights_sha256"]),
    )
    spec_of(config.deployment, library, where="steer.deployment")
    return library


def check_splice() -> None:
    """Refuse to replace rows by an SAE's where interventions are recorded into graphs.

    Raises:
        UnsupportedError: there is an accelerator.
    """
    if accelerator_present():
        raise UnsupportedError(
            "rows cannot be replaced on an accelerator: `splice` is not made in graphs",
            fix="set `server: {device: cpu}`, or leave it out (`spliced: []`)",
        )


def check_steer(steer: Iterable[Steer] | None, library: Library | None, *, where: str = f"{WHERE}.steer") -> None:
    """Refuse interventions that cannot be made.

    Raises:
        ConfigError: names the entry.
    """
    if steer is None:
        return
    if library is None:
        raise ConfigError(f"{where}: the recording has no library", fix="give `steer: {library: FOLDER}`")
    spec_of(tuple(steer), library, where=where)


def check_arms(arms: Mapping[str, Arm], library: Library | None) -> None:
    """Refuse interventions of arms that cannot be made.

    Raises:
        ConfigError: names arm and entry.
    """
    for name, arm in arms.items():
        check_steer(arm.steer, library, where=f"arm `{name}`: steer")
