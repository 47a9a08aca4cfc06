"""A harvest is copied while it is recorded; what is withheld was never copied."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sglang_probe.remote.download import download
from sglang_probe.remote.target import Target
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.end_to_end.conftest import cli

pytest.importorskip("fsspec")
