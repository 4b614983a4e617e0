"""test.sh's stages and summary, with a stand-in for every tool that it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("ruff check", "ruff format", "mypy", "docs", "pytest", "examples")

# Stands in for a Python: notes what was run, and fails where the variable FAIL says so.
STUB = """#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") ;;
    "-m "* | examples/*)
        echo "$*" >> ran.log
        case "$*" in
            "-m pytest"*) echo "reasons of the skips"; echo "== 7 passed, 2 skipped in 1.00s ==" ;;
        esac
        case "$*" in "${{FAIL:-nothing}}"*) exit 1 ;; esac
        ;;
    *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "examples").mkdir()
    for name in ("one.py", "two.py", "_helper.py"):
        (folder / "examples" / name).touch()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    return folder


def _test_sh(
    clone: Path, *arguments: str, fail: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The result, and what was run."""
    env = {**os.environ, "JDDIST_PYTHON": str(clone.parent / "python"), "FAIL": fail}
    command = ["bash", "launch/test.sh", *arguments]
    result = subprocess.run(
        command, cwd=clone, env=env, capture_output=True, text=True, timeout=120
    )
    log = clone / "ran.log"
    return result, log.read_text().splitlines() if log.exists() else []


def test_all_stages_run_and_the_summary_counts_skipped_tests(clone: Path) -> None:
    result, ran = _test_sh(clone)
    assert result.returncode == 0, result.stderr
    assert [line.split(" --out")[0] for line in ran] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        "-m sphinx -q -W -E docs build/docs",
        "-m pytest -n 2 -m not slow",
        "examples/one.py --smoke",
        "examples/two.py --smoke",
    ]
    summary = result.stdout.split("== summary")[1]
    assert all(f"passed  {stage}, " in summary for stage in STAGES)
    assert "tests: 2 skipped" in summary and "7 passed, 2 skipped in 1.00s" in summary
    assert "reasons of the skips" in result.stdout


@pytest.mark.parametrize(
    ("fail", "stage"),
    [
        ("-m ruff check", "ruff check"),
        ("-m ruff format", "ruff format"),
        ("-m mypy", "mypy"),
        ("-m sphinx", "docs"),
        ("-m pytest", "pytest"),
        ("examples/one.py", "examples"),
    ],
)
def test_a_stage_that_fails_is_named_and_the_others_run(clone: Path, fail: str, stage: str) -> None:
    result, ran = _test_sh(clone, fail=fail)
    assert result.returncode == 1
    assert f"failed: {stage}\n" in result.stderr
    for other in STAGES:
        outcome = "FAILED" if other == stage else "passed"
        assert f"{outcome}  {other}, " in result.stdout
    assert any(line.startswith("-m pytest") for line in ran)


def test_full_takes_the_long_forms_and_passes_arguments_on(clone: Path) -> None:
    result, ran = _test_sh(clone, "--full", "--", "-k", "a or b")
    assert result.returncode == 0, result.stderr
    assert "-m pytest -n 2 -m  -k a or b" in ran
    examples = [line for line in ran if line.startswith("examples/")]
    assert len(examples) == 2 and not any("--smoke" in line for line in examples)
