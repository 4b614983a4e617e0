"""The selftest's own parts: how ranks agree on a result, what is printed, and how it ends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jddist.selftest import Check, Finding, Result, run
from jddist.selftest.__main__ import main
from jddist.selftest.ranks import Ranks
from jddist.selftest.report import as_json, succeeded, table
from jddist.selftest.training import split, training_checks

ROOT = Path(__file__).parents[2]


def _ranks(rank: int, size: int, store: dist.Store, timeout: float = 20.0) -> Ranks:
    return Ranks(rank, size, "gloo", torch.device("cpu"), store, timeout)


def _run_in_threads(checks: list[Check], size: int, absent: int | None = None) -> list[Result]:
    """The results, which are the same on every rank that is there."""
    store, found = dist.HashStore(), {}
    timeout = 20.0 if absent is None else -4.5  # and the runner's own grace

    def work(rank: int) -> None:
        found[rank] = run(_ranks(rank, size, store, timeout), checks)

    threads = [threading.Thread(target=work, args=(r,)) for r in range(size) if r != absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, *others = found.values()
    assert all(repr(other) == repr(first) for other in others)
    return first


def _raise_on(bad: int) -> Check:
    def check(ranks: Ranks) -> Finding:
        if ranks.rank == bad:
            raise RuntimeError("no route to host")
        return Finding()

    return Check("raises", check)


GOOD = Check("good", lambda _: Finding(1e-16, 1e-10, note="fine"))


def test_the_worst_rank_counts() -> None:
    check = Check("uneven", lambda r: Finding(error=0.5 * (r.rank in (1, 2, 4)), tolerance=0.1))
    first, second = _run_in_threads([check, GOOD], 5)
    assert (first.outcome, first.error) == ("FAILED", 0.5)
    assert first.detail == "wrong on ranks 1-2, 4"
    assert (second.outcome, second.error, second.detail) == ("passed", 1e-16, "fine")


@pytest.mark.parametrize("rank", [0, 2])
def test_nan_is_no_success(rank: int) -> None:
    check = Check("nan", lambda r: Finding(math.nan if r.rank == rank else 0.0, tolerance=1.0))
    result, after = _run_in_threads([check, GOOD], 3)
    assert (result.outcome, result.detail) == ("FAILED", f"wrong on rank {rank}")
    assert after.outcome == "passed"


def test_what_must_be_the_same_and_is_not() -> None:
    result, _ = _run_in_threads([Check("same", lambda r: Finding(same="ab"[r.rank == 2])), GOOD], 4)
    assert result.outcome == "FAILED"
    assert result.detail == "the ranks differ: rank 0-1, 3: a; rank 2: b"


def test_after_an_exception_nothing_else_runs() -> None:
    first, second, third = _run_in_threads([GOOD, _raise_on(1), GOOD], 3)
    assert first.outcome == "passed"
    assert second.outcome == "FAILED" and math.isnan(second.error)
    assert second.detail == "rank 1: RuntimeError: no route to host"
    assert third.outcome == "not run"
    assert not succeeded([first, second, third]) and not succeeded([first, third])


def test_a_rank_that_does_not_answer_is_named() -> None:
    started = time.monotonic()
    first, second = _run_in_threads([GOOD, GOOD], 3, absent=2)
    assert first.detail == "rank 2: it did not answer" and second.outcome == "not run"
    assert time.monotonic() - started < 10


def test_the_table_and_the_json_say_the_same() -> None:
    results = [
        Result("a", "passed", 2.5e-16, 1e-10, 0.25),
        Result("bb", "FAILED", math.inf, 0.0, 0.5, "wrong on rank 1"),
        Result("c", "skipped", detail="one rank"),
        Result("d"),
    ]
    ranks = _ranks(0, 4, dist.HashStore())
    printed = table(results, ranks, 1.25)
    assert "ranks 4, backend gloo, device cpu" in printed
    assert "\na   passed    2.5e-16  1e-10       0.25\n" in printed
    assert "\nbb  FAILED    inf      0e+00       0.50  wrong on rank 1\n" in printed
    assert "NOT ok: 1 passed, 1 FAILED, 1 skipped, 1 not run, in 1.2 s" in printed
    content = json.loads(as_json(results, ranks, 1.25))
    assert content["ok"] is False and content["ranks"] == 4
    assert [check["error"] for check in content["checks"]] == [2.5e-16, None, None, None]
    assert succeeded([results[0], results[2]])


def test_a_wrapper_that_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jddist.selftest.wrappers.importlib.util.find_spec", lambda _: None)
    checks = [c for c in training_checks(["deepspeed"]) if c.name.startswith("deepspeed")]
    results = run(_ranks(0, 1, dist.HashStore()), checks)
    assert [r.outcome for r in results] == ["skipped"] * 3 and succeeded(results)
    assert results[0].detail == "found no jddist.integrations.deepspeed"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 64, 1000])
def test_splits_are_uneven_and_small(size: int) -> None:
    sizes = split(size)
    assert len(sizes) == size and 3 <= sum(sizes) <= 64 and min(sizes) >= 0
    assert size == 1 or len(set(sizes)) > 1
    assert size < 3 or 0 in sizes


def _command(
    *arguments: str, code: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "jddist.selftest"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *program, *arguments],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=90,
    )


# A process in which one of the checks hangs, and which takes no notice of the tests' package.
HANG = """
import sys, time
from jddist.selftest import Check, __main__ as command
command.collective_checks = lambda: [Check("sleeps", lambda _: time.sleep(300))]
sys.exit(command.main(sys.argv[1:]))
"""


def test_a_hang_ends_with_a_message_and_the_table() -> None:
    result = _command("--timeout", "2", code=HANG)
    assert result.returncode == 3
    assert "rank 0" in result.stderr and "no end of 'sleeps' within 2 s" in result.stderr
    assert "time.sleep" in result.stderr or "<lambda>" in result.stderr  # the stack
    assert "sleeps" in result.stdout and "NOT ok" in result.stdout


@pytest.mark.parametrize(("error", "code"), [(0.0, 0), (0.5, 1), (math.nan, 1)])
def test_the_exit_code_says_whether_all_is_well(
    error: float, code: int, capfd: pytest.CaptureFixture[str], no_group: pytest.MonkeyPatch
) -> None:
    checks = [Check("only", lambda _: Finding(error, tolerance=0.1))]
    no_group.setattr("jddist.selftest.__main__.collective_checks", lambda: checks)
    no_group.setattr("jddist.selftest.__main__.training_checks", lambda _: [])
    found, _ = _main(capfd)
    assert found == code and not dist.is_initialized()


@pytest.mark.parametrize("alone", [False, True])
def test_one_process_needs_no_torchrun(alone: bool) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} if alone else {}
    result = _command("--json", *(["--alone"] if alone else []), **ranks)
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["ok"] is True and (content["ranks"], content["backend"]) == (1, "gloo")
    ran = [check for check in content["checks"] if check["outcome"] == "passed"]
    assert len(ran) >= 15 and all(check["error"] <= check["tolerance"] for check in ran)
    assert result.stderr == ""


def _main(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str]:
    """The exit code and what was written to stderr."""
    try:
        code: int | str | None = main(arguments)
    except SystemExit as exit:
        code = exit.code
    return code, capfd.readouterr().err


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without ranks or GPUs."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return monkeypatch


def test_missing_variables_are_named(
    capfd: pytest.CaptureFixture[str], no_group: pytest.MonkeyPatch
) -> None:
    no_group.setenv("RANK", "1")
    code, text = _main(capfd)
    assert code == 2
    assert "Found RANK without WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in text


def test_ranks_that_do_not_come_are_not_waited_for() -> None:
    # In a process of its own, which the watchdog may end.
    nobody = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = _command("--timeout", "10", **nobody)
    assert result.returncode == 2, result.stderr
    assert "Found no group of ranks by gloo at 127.0.0.1:1 within 5 s" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "0"], "found --timeout 0.0; expected seconds"),
        (["--wrappers", "fsdp1"], "invalid choice: 'fsdp1'"),
        (["--backend", "nccl"], "Found 0 GPUs for local rank 0 with the backend nccl"),
        (["--backend", "nccl", "--device", "cpu"], "Leave out --device"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    no_group: pytest.MonkeyPatch,
) -> None:
    code, text = _main(capfd, *arguments)
    assert code == 2 and message in text


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Exit code: 0 if all is well" in capfd.readouterr().out
