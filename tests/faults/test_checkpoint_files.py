"""Checkpoints against kills, damage, full disks and malice: the last good one is never lost."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jddist.checkpoint import Checkpointer, _storage
from jddist.checkpoint._directory import Directory, fingerprint
from jddist.errors import CheckpointError
from tests.faults._run import Run


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(3)
    run.save()
    expected = run.steps(4)
    resumed = Run(tmp_path, seed=1)
    torch.manual_seed(7)
    assert resumed.resume() == 3
    assert torch.equal(resumed.steps(4), expected)


def test_a_save_in_the_background_is_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.steps(3)
    save = _storage.save

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        save(*arguments)

    monkeypatch.setattr(_storage, "save", slowly)
    started = time.monotonic()
    run.save(wait=False)
    assert time.monotonic() - started < 0.3
    expected = run.steps(4)  # while it is being written
    assert run.checkpointer.names() == []
    run.checkpointer.close()
    resumed = Run(tmp_path, seed=1)
    assert resumed.resume() == 3
    assert torch.equal(resumed.steps(4), expected)


def test_nothing_to_resume_from_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "none yet")
    before, random = run.parameters(), torch.get_rng_state()
    assert run.resume() is None
    assert torch.equal(run.parameters(), before) and torch.equal(torch.get_rng_state(), random)


def test_a_save_before_the_first_step_does_not_touch_the_optimizer(tmp_path: Path) -> None:
    """torch's get_optimizer_state_dict takes a step to find out what there is to save."""
    expected = Run(tmp_path / "unsaved").steps(3)
    run = Run(tmp_path)
    run.save()
    assert torch.equal(run.steps(3), expected)
    resumed = Run(tmp_path, seed=1)
    assert resumed.resume() == 0
    assert torch.equal(resumed.steps(3), expected)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for _ in range(4):
        run.steps(1)
        run.save()
    assert run.checkpointer.names() == ["000004-step-4", "000003-step-3"]
    assert (tmp_path / "latest").read_text() == "000004-step-4\n"
    assert run.checkpointer.load("000003-step-3").step == 3
    run.taken = 3  # went back: the same step again, and it is the newest
    run.save()
    assert run.checkpointer.names() == ["000005-step-3", "000004-step-4"]
    assert Run(tmp_path).resume() == 3


class _Killed(BaseException):
    """As if the process ended here: no clean-up of exceptions may run."""


CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def _dying_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Ends the process before the ``number``-th call that changes the disk; how many there were."""
    count = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                raise _Killed
            return function(*arguments, **options)

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    for name in ("mkdir", "open", "rename"):
        monkeypatch.setattr(Path, name, wrap(getattr(Path, name)))
    return lambda: count


def test_a_kill_at_any_moment_of_a_save_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, keep=1)
    parameters = {}
    run.steps(1)
    run.save()
    parameters[1] = run.parameters()
    saved, number, outcomes = 1, 0, []
    while True:
        run.steps(1)
        parameters[run.taken] = run.parameters()
        with monkeypatch.context() as patch:
            calls = _dying_at(patch, number)
            try:
                run.save()
                finished = True
            except _Killed:
                finished = False
            assert calls() >= number
        resumed = Run(tmp_path, seed=1, keep=1)
        step = resumed.resume()
        assert step in (saved, run.taken), "lost the last good checkpoint"
        assert torch.equal(resumed.parameters(), parameters[step])
        outcomes.append(step == run.taken)
        saved = step
        if finished:
            break
        number += 1
    assert number > 20  # it was killed at that many moments
    assert not outcomes[0] and outcomes[-1]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def _flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit in the tensors": lambda p: _flip(p / "__0_0.distcp", 0.5),
    "shorter tensors": lambda p: _truncate(p / "__0_0.distcp"),
    "no tensors": lambda p: (p / "__0_0.distcp").unlink(),
    "flipped bit in the structure": lambda p: _flip(p / "structure.pt", 0.5),
    "flipped bit in the metadata": lambda p: _flip(p / ".metadata", 0.3),
    "flipped bit in the random state": lambda p: _flip(p / "random-0.pt", 0.3),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "empty manifest": lambda p: (p / "manifest.json").write_bytes(b""),
    "another step": lambda p: (p / "manifest.json").write_text(
        (p / "manifest.json").read_text().replace('"step": 2', '"step": 3')
    ),
    "binary manifest": lambda p: (p / "manifest.json").write_bytes(os.urandom(64)),
}


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Run]:
    """A run with the checkpoints of steps 1 and 2."""
    run = Run(tmp_path, keep=2)
    for _ in range(2):
        run.steps(1)
        run.save()
    yield run


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(two: Run, tmp_path: Path, damage: str) -> None:
    DAMAGE[damage](tmp_path / "000002-step-2")
    resumed = Run(tmp_path, seed=1, keep=2)
    with pytest.warns(UserWarning, match="Passed over a damaged checkpoint.*000002-step-2"):
        assert resumed.resume() == 1
    with pytest.raises(CheckpointError, match="000002-step-2"):
        resumed.checkpointer.load("000002-step-2")
    resumed.steps(1)
    resumed.save()  # the damaged one goes first, and does not count among those kept
    assert resumed.checkpointer.names() == ["000003-step-2", "000001-step-1"]


def test_no_silent_start_from_nothing(two: Run, tmp_path: Path) -> None:
    for name in two.checkpointer.names():
        _truncate(tmp_path / name / "structure.pt")
    before = two.parameters()
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError) as caught:
        two.resume()
    assert "no intact checkpoint" in str(caught.value) and "backup" in str(caught.value)
    assert torch.equal(two.parameters(), before)


def test_a_checkpoint_of_another_model_changes_nothing(two: Run, tmp_path: Path) -> None:
    other = Run(tmp_path, seed=1)
    other.model[4] = torch.nn.Linear(6, 5).double()
    other.model.add_module("more", torch.nn.Linear(2, 2))
    before = other.parameters()
    with pytest.raises(CheckpointError) as caught:
        other.resume()
    message = str(caught.value)
    assert "'run/model/4.bias' is torch.float64 [4] in the checkpoint" in message
    assert "'run/model/more.weight' is not in the checkpoint" in message
    assert torch.equal(other.parameters(), before)


WITNESS = Path(tempfile.gettempdir()) / f"jddist-was-here-{os.getpid()}"


class _Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {WITNESS}",)


@pytest.mark.parametrize("file", [".metadata", "structure.pt"])
def test_a_pickle_that_runs_code_is_refused(two: Run, tmp_path: Path, file: str) -> None:
    """Even if all checksums are right."""
    directory, name = Directory(tmp_path), "000002-step-2"
    path = tmp_path / name
    if file == ".metadata":
        (path / file).write_bytes(pickle.dumps(_Malice()))
    else:
        torch.save(_Malice(), path / file)
    manifest = directory.manifest(name)
    manifest["files"][file] = fingerprint(path / file)
    path.rename(directory.partial(name))
    directory.finish(name, manifest)
    before = two.parameters()
    with pytest.raises(CheckpointError, match="posix.system"):
        two.checkpointer.load(name)
    assert not WITNESS.exists()
    assert torch.equal(two.parameters(), before)


def test_what_could_not_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.schedule.verdict = Path("x")  # becomes a part of its state_dict
    with pytest.raises(CheckpointError, match="PosixPath at 'run/schedule/verdict'"):
        run.save()
    assert run.checkpointer.names() == []
    del run.schedule.verdict
    with pytest.raises(CheckpointError, match="JSON"):
        run.checkpointer.save(1, {"position": torch.ones(1)})
    with pytest.raises(ValueError, match="keep=0"):
        Run(tmp_path, keep=0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("left", [8, 56])
def test_a_full_disk(small_disk: Path, wait: bool, left: int) -> None:
    """With so many KiB left: it is full while torch writes, or only after that."""
    run = Run(small_disk, keep=1)
    run.steps(1)
    run.save()
    expected = run.parameters()
    status = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(status.f_bavail * status.f_bsize - left * 1024))
    run.steps(1)
    with pytest.raises(CheckpointError) as caught:
        run.save(wait=wait)
        run.checkpointer.wait()
    message = str(caught.value)
    assert "rank 0" in message and "No space left on device" in message
    assert "those that were there are untouched" in message
    assert [p.name for p in small_disk.iterdir() if p.name.startswith(".")] == []
    resumed = Run(small_disk, seed=1)
    assert resumed.resume() == 1
    assert torch.equal(resumed.parameters(), expected)


def test_a_disk_that_is_full_within_a_tensor(small_disk: Path) -> None:
    """Where torch.save goes on to fail in a way that does not tell the cause."""
    checkpointer = Checkpointer(small_disk, torch.nn.Linear(200, 60))
    checkpointer.save(0)
    status = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(status.f_bavail * status.f_bsize - 16384))
    with pytest.raises(CheckpointError, match="rank 0: OSError: .*No space left on device"):
        checkpointer.save(1)
    assert checkpointer.load_latest() is not None


@pytest.mark.parametrize("after", range(0, 9, 2))
def test_writes_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The same without a file system of its own: the disk is full after so many files."""
    run = Run(tmp_path)
    run.steps(1)
    run.save()
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left") as caught:
            run.steps(1)
            run.save()
    if "which is complete" in str(caught.value):
        assert Run(tmp_path).resume() == 2
    else:
        assert run.checkpointer.names() == ["000001-step-1"]
        run.save()
    assert Run(tmp_path).resume() == 2
