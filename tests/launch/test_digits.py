"""The main job in its short form, on one and on two ranks, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jddist.monitoring import Run

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def _digits(arguments: list[str], ranks: int | None) -> str:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    command = [sys.executable]
    if ranks is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["examples/digits.py", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]  # its end tells the error
    return result.stdout


def _metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [None, 2])
def test_smoke(ranks: int | None, tmp_path: Path) -> None:
    monitor = ["--monitoring", str(tmp_path / "monitor"), "--monitoring-every", "8"]
    printed = _digits(["--smoke", "--out", str(tmp_path), *monitor], ranks)
    run = Run.read(tmp_path / "monitor")
    assert [record.step for record in run.records] == [0, 8, 16, 24]  # of an epoch of 32
    assert run.counts["steps"] == 32 and run.records[-1].groups[0].objectives == 32
    assert run.sessions[0].num_ranks == (ranks or 1)
    metrics = _metrics(tmp_path)
    assert [m["method"] for m in metrics] == ["mean", "upgrad", "local-upgrad"]
    for record in metrics:
        assert record["ranks"] == (ranks or 1)
        assert 0 < record["train_loss"] < 2.31  # below that of guessing, log 10
        assert f"| {record['method']} | {ranks or 1} |" in printed
    for name in ("loss_curves.png", "gramian.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_the_global_curves_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """``--nproc`` compares 1, 2 and 3 ranks, here with batches that do not divide evenly."""
    options = ["--epochs", "2", "--seeds", "1", "--lr", "0.2", "--batch-size", "31"]
    printed = _digits(["--nproc", "3", *options, "--out", str(tmp_path)], None)
    assert "upgrad: the curves of [1, 2, 3] ranks differ by at most" in printed
    runs = {n: _metrics(tmp_path / f"ranks-{n}") for n in (1, 2, 3)}
    together = _metrics(tmp_path)
    assert len(together) == sum(map(len, runs.values()))
    assert {m["ranks"] for m in together} == {1, 2, 3}
    for name in ("loss_curves.png", "gramian.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)

    def curve(ranks: int, method: str) -> list[float]:
        return [m["train_loss"] for m in runs[ranks] if m["method"] == method]

    for method in ("mean", "upgrad"):
        for ranks in (2, 3):
            assert curve(ranks, method) == pytest.approx(curve(1, method), abs=1e-8)
    assert curve(1, "local-upgrad") == pytest.approx(curve(1, "upgrad"), abs=1e-8)
    assert curve(1, "local-upgrad")[-1] < curve(2, "local-upgrad")[-1] < curve(3, "mean")[-1]
