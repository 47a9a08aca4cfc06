"""A folder of a file system that fsspec knows (`s3://`, `gs://`, `file://`, ...), in which nothing half-written has its
final name.

An object store shows a file once all of it has arrived. On every other file system a file is written beside its place
and renamed. Credentials and options are the driver's own: its environment variables, or fsspec's configuration
(https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration), never a YAML of ours.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sglang_probe.errors import ConfigError

_SHOWN_WHEN_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"})
"""Protocols of stores in which a file appears when all of it has arrived."""

_TEMPORARY = ".part"
_CHUNK = 1 << 22

_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")
_SIGNATURE = re.compile(r"(://[^\s?]*\?)[^\s)'\"]+")


def shown(text: str) -> str:
    """A URL, or a text that has some, without passwords and signatures: as it may be told to others."""
    return _SIGNATURE.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


class Target:
    """Where a copy goes to, or comes from.

    Nothing is connected to before the first use: some drivers (FTP, SFTP, SMB) connect when they are made, and a target
    that is down, or hangs, must not hold up who is to record.

    Args:
        url: of a folder, which need not exist.

    Raises (on construction):
        ConfigError: fsspec or the driver of this protocol is not installed, or there is no such protocol.
    """

    def __init__(self, url: str) -> None:
        self._url = url if url.endswith("://") else url.rstrip("/")
        self.url = shown(self._url)
        """As it may be told to others."""
        try:
            import fsspec
        except ImportError as e:
            raise ConfigError(f"{self.url} needs fsspec", fix="pip install 'sglang-probe[runs]'") from e
        try:
            for link in self._url.split("::"):
                fsspec.get_filesystem_class(link.partition("://")[0] if "://" in link else "file")
        except (ImportError, ValueError) as e:  # the driver's own error names its package
            raise self._cannot(e) from e

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the folder in it.

        Raises:
            ConfigError: the driver cannot make anything of the URL. Exception: of the driver's own kind: it is down.
        """
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError, NotImplementedError) as e:
            raise self._cannot(e) from e
        return fs, str(root)

    @cached_property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @property
    def _direct(self) -> bool:
        names = self._fs.protocol
        return bool(_SHOWN_WHEN_WHOLE & {names, *(() if isinstance(names, str) else names)})

    def _cannot(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.url} cannot be opened: {shown(str(error))}", fix="install the driver that it names")

    def put(self, file: Path, name: str, moved: Callable[[], None] = lambda: None) -> None:
        """Copy a file, or replace the one that is there.

        Args:
            moved: told from time to time that it goes on; of a store, where its driver says so.

        Raises:
            Exception: of the driver's own kind: it did not arrive.
        """
        self._written(name, file.stat().st_size, lambda path: self._put(file, path, moved))

    def _put(self, file: Path, path: str, moved: Callable[[], None]) -> None:
        from fsspec.callbacks import Callback

        if self._direct:
            hooks = {"moved": lambda *_args, **_more: moved()}
            self._fs.put_file(str(file), path, callback=Callback(hooks=hooks))
            return
        with (
            file.open("rb") as here,
            self._fs.open(path, "wb") as there,
        ):
            while data := here.read(_CHUNK):
                there.write(data)
                moved()

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
