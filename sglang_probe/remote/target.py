"""A folder of a file system that fsspec knows (`s3://`, `gs://`, `file://`, ...), in which nothing half-written has its
final name.

An object store shows a file once all of it has arrived. On every other file system a file is written beside its place
and renamed. Credentials and options are the driver's own: its environment variables, or fsspec's configuration
(https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration), never a YAML of ours.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from sglang_probe.errors import ConfigError

_SHOWN_WHEN_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"})
"""Protocols of stores in which a file appears when all of it has arrived."""

_TEMPORARY = ".part"


class Target:
    """Where a copy goes to, or comes from.

    Args:
        url: of a folder, which need not exist.

    Raises (on construction):
        ConfigError: fsspec or the driver of this protocol is not installed, or there is no such protocol.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec
        except ImportError as e:
            raise ConfigError(f"{url} needs fsspec", fix="pip install 'sglang-probe[runs]'") from e
        try:
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, NotImplementedError) as e:  # the driver's own error names its package
            raise ConfigError(f"{url} cannot be opened: {e}", fix="install the driver that it names") from e
        names = self._fs.protocol
        self._direct = bool(_SHOWN_WHEN_WHOLE & {names, *(() if isinstance(names, str) else names)})

    def put(self, file: Path, name: str, moved: Callable[[], None] = lambda: None) -> None:
        """Copy a file, or replace the one that is there.

        Args:
            moved: told from time to time that it goes on, where the driver says so.

        Raises:
            Exception: of the driver's own kind: it did not arrive.
        """
        from fsspec.callbacks import Callback

        hooks = {"moved": lambda *_args, **_more: moved()}
        size = file.stat().st_size
        self._written(name, size, lambda path: self._fs.put_file(str(file), path, callback=Callback(hooks=hooks)))

    def put_bytes(self, data: bytes, name: str) -> None:
        """Write a small file; raises as `put`."""
        self._written(name, len(data), lambda path: self._fs.pipe_file(path, data))

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there. Raises as `put`."""
        try:
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def fetch(self, name: str, file: Path) -> None:
        """Copy a file from there. Raises as `put`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(self._path(name), str(file))

    def sizes(self, within: str = "") -> dict[str, int]:
        """Bytes of every file in a folder of it and below, by the path in that folder. Raises as `put`."""
        self._fs.invalidate_cache()
        top = self._path(within).rstrip("/")
        try:
            found = self._fs.find(top, detail=True)
        except FileNotFoundError:
            return {}
        return {path[len(top) :].lstrip("/"): int(told["size"]) for path, told in found.items() if path != top}

    def remove(self, name: str) -> None:
        """Delete a file, if it is there. Raises as `put`."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    @staticmethod
    def is_temporary(name: str) -> bool:
        """Whether a file is what a copy left that was cut off."""
        last = PurePosixPath(name).name
        return last.startswith(".") and last.endswith(_TEMPORARY)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _written(self, name: str, size: int, write: Callable[[str], None]) -> None:
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        place = path if self._direct else f"{folder}/.{last}.{uuid.uuid4().hex[:8]}{_TEMPORARY}"
        if not self._direct:
            self._fs.makedirs(folder, exist_ok=True)
        try:
            write(place)
            self._fs.invalidate_cache()
            arrived = int(self._fs.info(place)["size"])
            if arrived != size:
                raise OSError(f"{self.url}/{name} has {arrived} of {size} bytes")
            if place != path:
                self._fs.mv(place, path)
        except BaseException:
            if place != path:
                with suppress(Exception):  # else the next look deletes it
                    self._fs.rm_file(place)
            raise
