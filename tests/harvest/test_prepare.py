"""What is checked before an engine is started on a machine with a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_probe.errors import UnsupportedError
from sglang_probe.harvest import prepare
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.policy.arm import Arm


def _prepare(**fields: Any) -> prepare.Prepared:
    workload = {"source": "shared_prefix", "families": 1, "requests_per_family": 1}
    return prepare.prepare(HarvestConfig.model_validate({"workload": workload, **fields}), {"harvest": Arm()})


@pytest.mark.reviewed("accelerator rows")
def test_rows_need_an_explicit_opt_in_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "accelerator_present", lambda: True)
    with pytest.raises(UnsupportedError, match=r"has been shown on one model of GPU only(.|\n)*accelerator: unproved"):
        _prepare(hook_points=["hook_embed"])
    _prepare(hook_points=[])
    _prepare(hook_points=["hook_embed"], accelerator="unproved")
