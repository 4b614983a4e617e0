"""The examples on sharded parameters, as a user starts them: under torchrun and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
BOUND = 1e-10  # the project's, in float64


def _example(name: str, arguments: list[str], ranks: int | None = None) -> str:
    for package in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    command = [sys.executable]
    if ranks is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [f"examples/{name}.py", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]  # its end tells the error
    return result.stdout


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _curves(folder: Path) -> dict[str, list[float]]:
    """All the numbers that must not depend on the number of ranks, by method."""
    curves: dict[str, list[float]] = {}
    for record in _records(folder / "metrics.jsonl"):
        of_method = curves.setdefault(record["method"], [])
        of_method += record["train_loss"] + record["test_loss"] + record["test_error"]
    for record in _records(folder / "steps.jsonl"):
        curves[record["method"]] += record["weights"] + record["cosines"]
    return curves


def test_the_tasks_curves_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """1, 2 and 4 ranks; 25 pairs a step do not divide evenly by any. The trunk is aggregated layer
    by layer, by a method with weights and by one without."""
    options = ["--epochs", "2", "--pairs", "75", "--batch-size", "25", "--seeds", "1"]
    options += ["--method", "upgrad", "graddrop", "--grouping", "per_layer", "--nproc", "4"]
    printed = _example("mtl_fsdp", [*options, "--out", str(tmp_path)])
    assert "the losses and weights of [1, 2, 4] ranks differ by at most" in printed
    runs = {n: _curves(tmp_path / f"ranks-{n}") for n in (1, 2, 4)}
    for method in ("upgrad", "graddrop"):
        assert len(runs[1][method]) == 2 * 9 + 6 * (3 + (method == "upgrad") * 3)
        for ranks in (2, 4):
            assert runs[ranks][method] == pytest.approx(runs[1][method], abs=BOUND, rel=0)
            assert f"| {method} | {ranks} | sum |" in printed
    first, last = _records(tmp_path / "ranks-2" / "metrics.jsonl")[:2]
    assert sum(last["train_loss"]) < sum(first["train_loss"])
    for folder in (tmp_path, tmp_path / "ranks-2"):
        for name in ("curves.png", "weights_and_conflicts.png"):
            assert (folder / name).read_bytes().startswith(PNG)


def test_llama_learns_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = _example("llama_iwrm_fsdp", ["--smoke", "--out", str(tmp_path)], ranks=2)
    runs = _records(tmp_path / "metrics.jsonl")
    assert [run["method"] for run in runs] == ["mean", "upgrad"]
    for run in runs:
        assert run["ranks"] == 2
        assert len(run["losses"]) == len(run["conflicts"]) == 20
        # From guessing among 96 characters, log 96, to better than that.
        assert 4.3 < run["losses"][0] < 4.8 and run["losses"][-1] < 3.6
        assert 0 < run["conflicts"][0] < 1
        assert f"| {run['method']} | 2 |" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mtl_fsdp", "llama_iwrm_fsdp"])
def test_help_says_how_to_start(name: str) -> None:
    assert "torchrun --standalone --nproc-per-node 2" in _example(name, ["--help"])
