"""How the examples start their own ranks."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_torchrun_leaves_a_scripts_options_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--nproc and --monitor are short forms of options of torchrun's own."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    torchrun = importlib.import_module("_ranks").torchrun
    script, told = tmp_path / "script.py", tmp_path / "told"
    script.write_text(
        "import os, sys\n"
        f"with open({str(told)!r} + os.environ['RANK'], 'w') as file:\n"
        "    file.write(' '.join(sys.argv[1:]))\n"
    )
    torchrun(str(script), 2, ["--nproc", "2", "--monitor", "runs", "--smoke"])
    for rank in range(2):
        text = Path(f"{told}{rank}").read_text()
        assert text == "--nproc 2 --monitor runs --smoke"
