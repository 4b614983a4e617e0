"""The selftest on several ranks: it passes where all is well, and notices what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jddist.distribution.base import Distribution
from jddist.distribution.collectives import Group
from jddist.distribution.data_parallel import DataParallel
from jddist.selftest import Check, Result, run
from jddist.selftest.collectives import collective_checks
from jddist.selftest.ranks import Ranks
from jddist.selftest.training import training_checks
from tests._ranks import run_ranks

ROOT = Path(__file__).parents[2]


def _torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "jddist.selftest", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


def test_four_ranks_print_a_table() -> None:
    result = _torchrun(4)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "ranks 4, backend gloo, device cpu" in result.stdout
    assert result.stdout.count("jddist selftest") == 1  # rank 0 alone
    assert "ok: " in result.stdout and "FAILED" not in result.stdout
    for line in ("uneven all-to-all", "ddp: per sample", "fully_shard: per task by rows, MoCo"):
        assert f"\n{line}" in result.stdout


@pytest.mark.slow
def test_deepspeed() -> None:
    for package in ("deepspeed", "jddist.integrations.deepspeed"):
        pytest.importorskip(package, exc_type=ImportError)
    result = _torchrun(2, "--json", "--wrappers", "deepspeed")
    assert result.returncode == 0, result.stderr[-4000:]
    checks = json.loads(result.stdout)["checks"]
    trained = [check for check in checks if check["name"].startswith("deepspeed: ")]
    assert len(trained) == 3
    assert all(0 < c["error"] <= c["tolerance"] == 1e-5 for c in trained)


def _ranks(rank: int, world_size: int) -> Ranks:
    store = dist.distributed_c10d._get_default_store()
    return Ranks(rank, world_size, "gloo", torch.device("cpu"), store, 20.0)


def _off_by_one_on_last_rank(rank: int, world_size: int) -> Callable[[Group, Tensor], Tensor]:
    plain = Group.all_reduce

    def all_reduce(self: Group, tensor: Tensor) -> Tensor:
        return plain(self, tensor).add_(rank == world_size - 1)

    return all_reduce


def _named(checks: list[Check], *names: str) -> list[Check]:
    return [check for check in checks if check.name in names]


def _broken(rank: int, world_size: int) -> dict[str, list[str]]:
    """What each fault does to the results: the names of the checks that failed, by fault."""
    ranks = _ranks(rank, world_size)
    plain_gather = Group.all_gather_uneven
    plain_exchange, plain_payloads = Group.exchange, Group.gather_payloads
    faults = {
        "all_reduce": _off_by_one_on_last_rank(rank, world_size),
        "all_gather_uneven": lambda s, t, n: plain_gather(s, t, n)[::-1],
        "exchange": lambda s, t, n: lambda: plain_exchange(s, t, n)().flip(0),
        "reduce_scatter": lambda s, t: t[s.rank],
        "gather_payloads": lambda s, p, n: [*plain_payloads(s, p, n)[:-1], b""],
    }
    found = {"none": _failed(ranks, collective_checks())}
    for number, (name, fault) in enumerate(faults.items()):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(Group, name, fault)
            found[name] = _failed(ranks, collective_checks(), f"fault{number}")
    training = _named(training_checks(["ddp"]), "ddp: per sample, UPGrad")
    with pytest.MonkeyPatch.context() as monkeypatch:
        # The classic mistake: the sum over ranks in place of what the wrapper averages.
        monkeypatch.setattr(Distribution, "backward_factor", lambda *_: 1.0)
        monkeypatch.setattr(DataParallel, "takes_gradients", lambda *_: False)
        found["factor"] = _failed(ranks, training, "factor")
    found["sound"] = _failed(ranks, training, "sound")
    return found


def _failed(ranks: Ranks, checks: list[Check], prefix: str = "") -> list[str]:
    store = dist.PrefixStore(f"selftest-{prefix}", ranks.store)
    apart = Ranks(ranks.rank, ranks.size, ranks.backend, ranks.device, store, ranks.timeout)
    results: list[Result] = run(apart, checks)
    return [result.name for result in results if result.outcome != "passed"]


def test_what_is_broken_is_noticed() -> None:
    first, *others = run_ranks(_broken, 3)
    assert all(other == first for other in others)
    assert first["none"] == [] and first["sound"] == []
    assert first["all_reduce"] == ["all-reduce"]
    assert "uneven all-gather" in first["all_gather_uneven"]
    assert "uneven all-to-all" in first["exchange"]
    assert first["reduce_scatter"] == ["reduce-scatter"]
    assert first["gather_payloads"] == ["small messages (gloo, CPU)"]
    assert first["factor"] == ["ddp: per sample, UPGrad"]
