"""The launch scripts: help, refusals, and when they install. No network: pip is a stub."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(command: list[str], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.sh")))
def test_scripts_parse(script: str) -> None:
    assert _run(["bash", "-n", f"launch/{script}"]).returncode == 0


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_names_the_environment_variables(script: str) -> None:
    result = _run(["bash", f"launch/{script}", "--help"])
    assert result.returncode == 0
    assert "JDDIST_TORCH" in result.stdout and "JDDIST_PYTHON" in result.stdout


def test_an_unknown_argument_is_refused_before_anything_is_installed() -> None:
    result = _run(["bash", "launch/test.sh", "--fast"])
    assert result.returncode == 1
    assert "--fast" in result.stderr and "--full" in result.stderr


def test_ci_calls_the_readmes_test_command() -> None:
    command = "bash launch/test.sh"
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()


# Stands in for a Python: `-m venv` copies it, `-m pip` writes down how it was called.
STUB = """#!/usr/bin/env bash
if [ "$1" = -m ] && [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$1" = -m ] && [ "$2" = pip ]; then
    shift 2
    echo "$*" >> pip.log
    [ ! -e fail ] || exit 1
else
    exec "{python}" "$@"
fi
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A tree with the files that installing looks at, and a Python that installs nothing."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    stub = tmp_path / "a python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return folder


def _install(clone: Path, extras: str = "examples", **environment: str) -> list[str]:
    """What pip was called with; empty if the installation was skipped."""
    log = clone / "pip.log"
    log.unlink(missing_ok=True)
    script = f". launch/_environment.sh; install_extras {extras}; echo $python"
    stub = str(clone.parent / "a python")
    result = _run(["bash", "-euc", script], cwd=clone, JDDIST_PYTHON=stub, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(f"{clone}/.venv/bin/python")
    return log.read_text().splitlines() if log.exists() else []


def test_torch_is_installed_first_and_pinned(clone: Path) -> None:
    first, second = _install(clone)
    assert first == "install --quiet -c constraints.txt torch"
    assert "torch==2.13.0" in (clone / "constraints.txt").read_text().splitlines()
    assert second.endswith("-e .[examples]")


def test_a_second_run_installs_nothing_until_something_changes(clone: Path) -> None:
    assert _install(clone)
    assert _install(clone) == []
    assert len(_install(clone, "dev,examples,test")) == 2
    assert _install(clone) == []
    (clone / "constraints.txt").write_text("torch==2.13.0\nsix==1.17.0\n")
    assert len(_install(clone)) == 2


def test_another_build_of_torch(clone: Path) -> None:
    requirement = "torch==2.13.0 --index-url https://example.invalid/cu130"
    first, _ = _install(clone, JDDIST_TORCH=requirement)
    assert first == f"install --quiet {requirement}"
    pins = (clone / ".venv" / "constraints.txt").read_text().splitlines()
    assert f"torch=={version('torch')}" in pins  # as it came, whatever the constraints say
    assert any(pin.startswith("numpy==") for pin in pins)


def test_changing_the_build_removes_the_other_one(clone: Path) -> None:
    """To pip, torch 2.13.0+cpu already satisfies torch==2.13.0 of an index of CUDA builds."""
    requirement = "torch==2.13.0 --index-url https://example.invalid/cu130"
    assert len(_install(clone, "dev,examples,test")) == 2
    assert len(_install(clone)) == 2
    remove, first, _ = _install(clone, JDDIST_TORCH=requirement)
    assert remove == "uninstall --quiet --yes torch"
    assert first == f"install --quiet {requirement}"
    assert _install(clone, JDDIST_TORCH=requirement) == []
    # What was installed for the tests, with the other build, is no longer up to date either.
    assert len(_install(clone, "dev,examples,test")) == 3


def test_what_an_interrupted_run_left_is_repaired(clone: Path) -> None:
    """`python -m venv` makes the interpreter first and pip afterwards."""
    broken = clone / ".venv" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/usr/bin/env bash\nexit 1\n")
    broken.chmod(0o755)
    assert len(_install(clone)) == 2


def test_an_environment_with_an_old_python_is_refused(clone: Path) -> None:
    old = clone / ".venv" / "bin" / "python"
    old.parent.mkdir(parents=True)
    old.write_text('#!/usr/bin/env bash\n[ "$2" = "import pip" ]\n')
    old.chmod(0o755)
    stub = str(clone.parent / "a python")
    script = ". launch/_environment.sh; install_extras examples"
    result = _run(["bash", "-euc", script], cwd=clone, JDDIST_PYTHON=stub)
    assert result.returncode == 1
    assert "older Python in .venv" in result.stderr


def test_a_failed_installation_is_tried_again(clone: Path) -> None:
    (clone / "fail").touch()
    script = ". launch/_environment.sh; install_extras examples"
    stub = str(clone.parent / "a python")
    result = _run(["bash", "-euc", script], cwd=clone, JDDIST_PYTHON=stub)
    assert result.returncode == 1 and "could not install torch" in result.stderr
    (clone / "fail").unlink()
    assert len(_install(clone)) == 2


def test_an_old_python_is_refused(clone: Path) -> None:
    result = _run(
        ["bash", "-euc", ". launch/_environment.sh; install_extras examples"],
        cwd=clone,
        JDDIST_PYTHON="/bin/false",
    )
    assert result.returncode == 1
    assert "Python >= 3.11" in result.stderr
