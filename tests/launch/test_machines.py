"""The launchers for real: ranks that meet on one machine, on two, in a SLURM job, after a failure.

The two machines are network namespaces where those are permitted: each has its own address, and the
machine's name leads to neither of them. Elsewhere they are two addresses of the loopback.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch._machines import Machine, NotPermittedError, two_machines
from tests.launch._running import RANK, ROOT, finish, run, start


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    try:
        with two_machines() as machines:
            yield machines
    except NotPermittedError as error:
        pytest.skip(f"network namespaces are not permitted: {error}")


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    """Whatever a test started has ended with it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    children = psutil.Process().children(recursive=True)
    left = [c for c in children if c.pid not in before and c.status() != psutil.STATUS_ZOMBIE]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert [c.cmdline() for c in alive if "forkserver" not in " ".join(c.cmdline())] == []


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _found(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("attempt*.json"))]


def _check_all_met(found: list[dict], size: int) -> None:
    assert sorted(f["rank"] for f in found) == list(range(size))
    for f in found:
        assert f["size"] == size and f["sum"] == size * (size + 1) / 2
        assert f["NCCL_DEBUG"] == "WARN" and f["OMP_NUM_THREADS"]


def test_one_machine(tmp_path: Path) -> None:
    code, _, err = run("launch/torchrun.sh", "--nproc", "2", RANK, str(tmp_path))
    assert code == 0, err
    _check_all_met(_found(tmp_path), 2)


def test_after_a_failure_all_ranks_start_again(tmp_path: Path) -> None:
    words = ["--nproc", "2", "--max-restarts", "1", RANK, str(tmp_path), "--fail-once"]
    code, _, err = run("launch/elastic.sh", *words)
    assert code == 0, err
    found = [f for f in _found(tmp_path) if f["attempt"] == 1]
    _check_all_met(found, 2)
    assert "exitcode: 7" in err  # it did fail


# Takes the place of ssh: HOST COMMAND, on the machine with that address.
SSH = """#!/usr/bin/env bash
echo "$1" >> "$SSH_LOG"
case $1 in
{cases}
esac
exec ip netns exec "$name" bash -c "$2"
"""


@pytest.fixture
def ssh(machines: list[Machine], tmp_path: Path) -> dict[str, str]:
    """The variables that put the stand-in for ssh in its place."""
    script = tmp_path / "ssh"
    cases = "\n".join(f"    {m.address}) name={m.name} ;;" for m in machines)
    script.write_text(SSH.format(cases=cases))
    script.chmod(0o755)
    return {"JDDIST_SSH": str(script), "SSH_LOG": str(tmp_path / "ssh.log")}


def test_two_machines_by_ssh_run_the_selftest(machines: list[Machine], ssh: dict[str, str]) -> None:
    """Between two hosts whose own names lead nowhere, training equals that of one process."""
    hosts = ",".join(m.address for m in machines)
    words = ["--hosts", hosts, "--ssh", "--nproc", "1", "--timeout", "60"]
    words += ["-m", "jddist.selftest", "--json", "--wrappers", "ddp"]
    code, out, err = run("launch/multinode.sh", *words, **ssh)
    assert code == 0, err
    content = json.loads(out)
    assert content["ok"] is True and content["ranks"] == 2
    checks = {check["name"]: check for check in content["checks"]}
    assert "GB/s" in checks["all-reduce, 8 MiB"]["detail"]
    errors = [check["error"] for name, check in checks.items() if name.startswith("ddp")]
    assert 0 < max(errors) <= 1e-10
    assert Path(ssh["SSH_LOG"]).read_text().split() == hosts.split(",")


def test_a_machine_that_fails_ends_the_others(
    machines: list[Machine], ssh: dict[str, str], tmp_path: Path
) -> None:
    """The second host has no Python: the first does not wait for it until its timeout."""
    program = tmp_path / "python"
    address = machines[1].address
    program.write_text(f'#!/bin/sh\ncase "$*" in *{address}\\ *--node-rank\\ 1*) exit 9 ;; esac\n')
    with program.open("a") as file:
        file.write(f'exec {shlex.quote(sys.executable)} "$@"\n')
    program.chmod(0o755)
    hosts = ",".join(m.address for m in machines)
    words = ["--hosts", hosts, "--ssh", "--nproc", "1", RANK, str(tmp_path)]
    code, _, err = run("launch/multinode.sh", *words, **ssh, JDDIST_RUN_PYTHON=str(program))
    assert code == 1 and "the others were stopped" in err, err


def test_two_machines_by_hand(machines: list[Machine], tmp_path: Path) -> None:
    """The same command on each; the machine finds its place, its address and its interface."""
    hosts = ",".join(m.address for m in machines)
    words = ["launch/multinode.sh", "--hosts", hosts, "--nproc", "1", "--dry-run", "x.py"]
    for rank, machine in enumerate(machines):
        inside = ["ip", "netns", "exec", machine.name, "bash", *words]
        code, out, err = run("-c", shlex.join(inside))
        assert code == 0, err
        printed = shlex.split(out)
        assert f"GLOO_SOCKET_IFNAME={machine.interface}" in printed
        assert printed[printed.index("--local-addr") + 1] == machine.address
        is_host = "true" if rank == 0 else "false"
        assert f"is_host={is_host},join_timeout=600" in printed


def test_two_node_ranks_on_the_loopback(tmp_path: Path) -> None:
    """Where namespaces are not permitted, this is what shows that two launchers meet."""
    words = ["launch/multinode.sh", "--nproc", "1", "--timeout", "60", RANK, str(tmp_path)]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "NNODES": "2"}
    processes = [start(*words, **job, NODE_RANK=str(rank)) for rank in range(2)]
    for code, _, err in [finish(process) for process in processes]:
        assert code == 0, err
    _check_all_met(_found(tmp_path), 2)
    assert {f["GLOO_SOCKET_IFNAME"] for f in _found(tmp_path)} == {"lo"}


# Takes the place of srun: starts the command once for each node, as its task, and sets what SLURM
# sets there. As with --kill-on-bad-exit, the first that fails ends all.
SRUN = """#!/usr/bin/env bash
while [ "$1" != bash ]; do
    [ "$1" != --ntasks ] || tasks=$2
    shift
done
trap 'kill $(jobs -p) 2> /dev/null' EXIT
trap 'kill -TERM $(jobs -p); wait; exit 143' TERM
for ((task = 0; task < tasks; task++)); do
    SLURM_NODEID=$task SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NTASKS=$tasks \\
        SLURMD_NODENAME=node$task "$@" &
done
for ((task = 0; task < tasks; task++)); do wait -n || exit $?; done
"""


def test_a_slurm_job(tmp_path: Path) -> None:
    """Two nodes in SLURM's own notation, which are two addresses of the loopback."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = {
        "PATH": f"{srun.parent}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_CPUS_PER_TASK": "2",
    }
    spooled = tmp_path / "slurm_script"
    spooled.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
    words = [str(spooled), "--nproc", "2", "--port", _free_port(), RANK, str(tmp_path)]
    code, _, err = run(*words, cwd=tmp_path, **job)
    assert code == 0, err
    found = _found(tmp_path)
    _check_all_met(found, 4)
    assert sorted(f["GROUP_RANK"] for f in found) == ["0", "0", "1", "1"]
