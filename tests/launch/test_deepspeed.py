"""DeepSpeed's example and launcher as a user starts them, on two ranks of this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = (1, 2, 3)


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def _losses(folder: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["method"]: record["train_loss"] for record in records}


def _requires() -> None:
    for package in ("deepspeed", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The losses of one rank, which the example starts by itself."""
    _requires()
    folder = tmp_path_factory.mktemp("alone")
    config = str(ROOT / "launch/deepspeed/zero1.json")
    options = ["--smoke", "--config", config, "--out", str(folder)]
    result = _run([sys.executable, "examples/digits_deepspeed.py", *options])
    assert result.returncode == 0, result.stderr[-4000:]
    assert "| upgrad | 1 |" in result.stdout
    assert (folder / "loss_curves.png").stat().st_size > 0
    return _losses(folder)


def test_the_example_does_not_depend_on_ranks_and_stage(
    alone: dict[str, float], tmp_path: Path
) -> None:
    """Here ZeRO-3 on two ranks, which torchrun starts; losses after 32 steps in float32."""
    config = str(ROOT / "launch/deepspeed/zero3.json")
    options = ["--smoke", "--nproc", "2", "--config", config, "--out", str(tmp_path)]
    result = _run([sys.executable, "examples/digits_deepspeed.py", *options])
    assert result.returncode == 0, result.stderr[-4000:]
    assert _losses(tmp_path) == pytest.approx(alone, rel=1e-4)
    assert alone["upgrad"] < alone["mean"] < 2.31  # log 10 is guessing


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_launcher_runs_the_example(
    stage: int, alone: dict[str, float], tmp_path: Path
) -> None:
    printed = _run(["bash", "launch/deepspeed.sh", "--dry-run", "--stage", str(stage), "--smoke",
                    "--out", str(tmp_path)], JDDIST_PYTHON=sys.executable)  # fmt: skip
    command = shlex.split(printed.stdout)
    folder = str(Path(sys.executable).parent)
    result = _run(command, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr[-4000:]
    assert _losses(tmp_path) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_prints_the_command_and_installs_nothing(stage: int) -> None:
    command = ["bash", "launch/deepspeed.sh", "--dry-run", "--stage", str(stage), "--epochs", "5"]
    result = _run(command, JDDIST_NPROC="3", JDDIST_PYTHON=sys.executable, MASTER_PORT="29987")
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert words[words.index("--num_accelerators") + 1] == "3"
    assert words[words.index("--master_port") + 1] == "29987"
    config = json.loads((ROOT / words[words.index("--config") + 1]).read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == 0.0  # unset, DeepSpeed clips
    assert words[-2:] == ["--epochs", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "4"], "expected 1, 2 or 3"),
        (["--stage"], "expected 1, 2 or 3"),
        (["--hostfile", "nowhere"], "found no hostfile 'nowhere'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    result = _run(["bash", "launch/deepspeed.sh", *arguments])
    assert result.returncode == 1
    assert message in result.stderr


def test_help_names_the_options() -> None:
    result = _run(["bash", "launch/deepspeed.sh", "--help"])
    assert result.returncode == 0
    for name in ("--dry-run", "--stage", "--hostfile", "JDDIST_NPROC", "JDDIST_TORCH"):
        assert name in result.stdout
