"""Training that is killed and started again, by ``torchrun`` or by hand, as a user does it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from jddist.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]
EPOCHS, STEPS, EVERY = 3, 32, 4
RUN = "upgrad-seed-0-lr-0.2"


def _command(folder: Path, restarts: int, epochs: int, ranks: int = 2) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--method", "upgrad", "--seeds", "1", "--lr", "0.2", "--epochs", str(epochs)]
    places = ["--checkpoint-dir", str(folder / "checkpoints"), "--out", str(folder / "out")]
    return [
        *(sys.executable, *launcher, "--max-restarts", str(restarts), "examples/digits.py"),
        *(*options, *places, "--checkpoint-every", str(EVERY)),
    ]


@contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """The launcher, which does not outlive the test, nor do its workers."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("a") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=stream, stderr=stream)
    workers: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.wait()
        for worker in workers:
            if worker.is_running():
                worker.kill()


def _workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children()
    return [c for c in children if any("digits.py" in part for part in _arguments(c))]


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    names = sorted(p.name for p in (folder / "checkpoints" / RUN).glob("??????-step-*"))
    return int(names[-1].rpartition("-")[2]) if names else 0


def _wait_for(folder: Path, step: int, launcher: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while _newest(folder) < step:
        assert launcher.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.005)


def _parameters(folder: Path) -> tuple[int, torch.Tensor]:
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    loaded = Checkpointer(folder / "checkpoints" / RUN, model).load_latest()
    assert loaded is not None
    return loaded.step, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _undisturbed(folder: Path, epochs: int, ranks: int) -> torch.Tensor:
    folder.mkdir()
    with _started(_command(folder, 0, epochs, ranks), folder / "log") as launcher:
        assert launcher.wait(300) == 0, (folder / "log").read_text()[-4000:]
    step, parameters = _parameters(folder)
    assert step == epochs * STEPS
    return parameters


def _kill_and_check(folder: Path, kills: int, epochs: int, expected: torch.Tensor) -> None:
    """``kill -9`` of a random worker at random steps, while torchrun starts all of them again."""
    draw = random.Random(0)
    log = folder / "log"
    last = epochs * STEPS
    all_workers: list[psutil.Process] = []
    with _started(_command(folder, kills, epochs), log) as launcher:
        for number in range(kills):
            left = last - EVERY - _newest(folder)
            _wait_for(
                folder, _newest(folder) + draw.randint(1, left // (kills - number)), launcher, log
            )
            time.sleep(draw.uniform(0, 0.03))
            workers = _workers(launcher)
            assert len(workers) == 2, log.read_text()[-4000:]
            all_workers += workers
            before = {worker.pid for worker in workers}
            draw.choice(workers).kill()
            deadline = time.monotonic() + 120
            while len({w.pid for w in _workers(launcher)} - before) < 2:
                assert time.monotonic() < deadline and launcher.poll() is None, log.read_text()
                time.sleep(0.02)
        all_workers += _workers(launcher)
        assert launcher.wait(300) == 0, log.read_text()[-4000:]
    assert len({worker.pid for worker in all_workers}) == 2 * (kills + 1)
    assert not any(worker.is_running() for worker in all_workers)  # no orphans
    assert log.read_text().count("(exitcode: -9)") == kills
    step, parameters = _parameters(folder)
    assert step == last
    # Not bit by bit: a projector starts its iterations where the last ones ended.
    error = float((parameters - expected).abs().max())
    assert error <= 1e-12, error
    print(f"the parameters differ by {error:.1e}")


def test_sigterm_and_a_kill_end_where_an_undisturbed_run_ends(tmp_path: Path) -> None:
    # On one rank, which is the same: starting Python is what costs.
    expected = _undisturbed(tmp_path / "undisturbed", EPOCHS, 1)
    folder = tmp_path / "disturbed"
    folder.mkdir()
    log = folder / "sigterm"
    with _started(_command(folder, 1, EPOCHS), log) as launcher:
        _wait_for(folder, 2 * EVERY, launcher, log)
        workers = _workers(launcher)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) != 0  # torchrun's own code says that it was interrupted
    assert not any(worker.is_running() for worker in workers)
    text = log.read_text()
    assert "digits.py stopped by SIGTERM; the checkpoint " in text
    assert "The same command goes on from there." in text
    assert text.count("stopped by SIGTERM") == 1  # rank 0 alone says so
    stopped = _newest(folder)
    assert 2 * EVERY <= stopped < EPOCHS * STEPS
    assert f"-step-{stopped} was written" in text
    _kill_and_check(folder, 1, EPOCHS, expected)
    assert len((folder / "out" / "metrics.jsonl").read_text().splitlines()) == EPOCHS


@pytest.mark.slow
def test_the_exit_code_of_a_process_that_was_asked_to_stop(tmp_path: Path) -> None:
    command = _command(tmp_path, 0, 50)
    alone = [sys.executable, *command[command.index("examples/digits.py") :]]
    log = tmp_path / "log"
    with _started(alone, log) as process:
        _wait_for(tmp_path, EVERY, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in log.read_text()


@pytest.mark.slow
def test_ten_kills_in_one_run(tmp_path: Path) -> None:
    epochs = 8
    expected = _undisturbed(tmp_path / "undisturbed", epochs, 2)
    folder = tmp_path / "disturbed"
    folder.mkdir()
    _kill_and_check(folder, 10, epochs, expected)
