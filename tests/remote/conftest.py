"""A run directory as an engine writes it part by part, and file systems that fail."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.remote.target import Target
from sglang_probe.run import journal, schema, seal
from sglang_probe.run.manifest import MANIFEST

fsspec = pytest.importorskip("fsspec")


class Recorded:
    """A run of made-up files: what is copied is bytes, whatever they mean."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        path.mkdir(parents=True)
        self.manifest: dict[str, Any] = {"schema_version": schema.SCHEMA_VERSION, "status": "incomplete"}
        (path / MANIFEST).write_text(json.dumps(self.manifest))

    def part(self, text: str = "rows") -> None:
        """One part more is durable."""
        part = journal.Part(self.number, 0, 0, 0, 0)
        for name in (f"ledger/spans-{part.stem}.parquet", f"rows/hook_embed/shard-{part.stem}.safetensors"):
            content = f"{text} {name}" * 20
            part.files[name] = journal.write_durably(self.path / name, lambda p, c=content: p.write_text(c))
        journal.append(self.path, part)
        self.number += 1

    def close(self, status: str = "complete") -> None:
        """The recording has ended."""
        (self.path / "requests.parquet").write_text(f"requests of {self.number}")
        files = {n: d for p in journal.read(self.path) for n, d in p.files.items()}
        self.manifest = {**self.manifest, "status": status, "files": files}
        seal.close(self.path, self.manifest)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """Two parts, not closed."""
    run = Recorded(tmp_path / "run")
    run.part()
    run.part()
    return run


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of a store, and of a file system."""
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/there/run"


class Faulty:
    """A target's file system whose writes go wrong: `fail` is asked before each, and in the middle of each."""

    def __init__(self, target: Target, fail: Any) -> None:
        self._fs = target._fs
        self._fail, self.writes = fail, 0
        target._fs = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def put_file(self, file: str, path: str, **more: Any) -> None:
        """A write that goes wrong leaves half of the file, as a file system does."""
        self._wrong(path, Path(file).read_bytes())
        self._fs.put_file(file, path, **more)

    def open(self, path: str, mode: str, **more: Any) -> Any:
        """As `put_file`."""
        self._wrong(path, b"some of it")
        return self._fs.open(path, mode, **more)

    def pipe_file(self, path: str, data: bytes) -> None:
        """As `put_file`."""
        self._wrong(path, data)
        self._fs.pipe_file(path, data)

    def _wrong(self, path: str, data: bytes) -> None:
        self.writes += 1
        if self._fail(self.writes):
            if "file" in self._fs.protocol:
                self._fs.pipe_file(path, data[: len(data) // 2])
            raise ConnectionError("the target went away")


@pytest.fixture
def seen(url: str) -> Target:
    """What anybody sees of the target."""
    return Target(url)
