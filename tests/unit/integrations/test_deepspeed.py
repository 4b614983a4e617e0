"""DeepSpeed is needed where it is used, and nowhere else."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from torch import nn

from jddist.errors import UnsupportedModelError

MODULE = "jddist.integrations.deepspeed"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r'pip install "jddist\[deepspeed\]"'):
        importlib.import_module(MODULE)


def test_importing_jddist_does_not_import_deepspeed() -> None:
    code = "import sys, jddist; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_other_models_are_refused() -> None:
    pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "jddist[deepspeed]"')
    from jddist.integrations.deepspeed import attach

    with pytest.raises(UnsupportedModelError, match=r"Found a Linear; expected the engine"):
        attach(nn.Linear(2, 2))
