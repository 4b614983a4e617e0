"""The launchers: help, the command that a dry run prints, the environment, and what is refused."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch._running import ROOT, run

# Each launcher with arguments that suffice for a dry run.
LAUNCHERS: dict[str, list[str]] = {
    "launch/torchrun.sh": [],
    "launch/elastic.sh": [],
    "launch/multinode.sh": ["--hosts", "127.0.0.1", "--node-rank", "0"],
    "launch/slurm.sbatch": [],
    "launch/kubernetes/submit.sh": ["--image", "jddist:cpu"],
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


def _dry_run(script: str, *words: str, **variables: str) -> list[str]:
    """The words of the command that would have been run."""
    code, out, err = run(script, "--dry-run", *words, **variables)
    assert code == 0, err
    assert err == ""
    return shlex.split(out.splitlines()[-1])


def _options(words: list[str]) -> dict[str, str]:
    """torchrun's options by name."""
    return {
        word: words[i + 1]
        for i, word in enumerate(words[:-1])
        if word.startswith("--") and not words[i + 1].startswith("--")
    }


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_explains_all_options(script: str) -> None:
    code, out, _ = run(script, "--help")
    assert code == 0 and out.startswith("usage: ") and "environment variables" in out
    text = (ROOT / script).read_text()
    options = re.findall(r"^ +(--[a-z-]+)\)|(--[a-z-]+)=[a-z_]+[ ']", text, flags=re.MULTILINE)
    assert len(options) >= 2
    for option in options:
        assert "".join(option) in out
    for variable in set(re.findall(r"\$\{(JDDIST_[A-Z_]+)", text)) - {"JDDIST_SSH"}:
        assert variable in out


@pytest.mark.parametrize("script", LAUNCHERS)
def test_unknown_options_are_refused(script: str) -> None:
    code, _, err = run(script, *LAUNCHERS[script], "--bogus", "x.py", **JOB)
    assert code == 1 and "found the option '--bogus'" in err
    code, _, err = run(script, *LAUNCHERS[script], "--nproc", **JOB)
    assert code == 1 and "found --nproc without" in err
    code, _, err = run(script, *LAUNCHERS[script], "--nproc", "0", "--dry-run", **JOB)
    assert (code == 1 and "expected a whole number, 1 or more" in err) or "slurm" in script


# (Before slurm.sbatch knows where the others are, it reads its two options by itself.)
@pytest.mark.parametrize("script", [s for s in LAUNCHERS if "slurm" not in s])
def test_a_value_may_follow_an_equals_sign(script: str) -> None:
    code, out, err = run(script, *LAUNCHERS[script], "--nproc=3", "--dry-run", "x.py", "--lr=0.1")
    assert code == 0 and err == "", err
    assert "x.py" in out and "--lr=0.1" in out and "3" in out
    code, _, err = run(script, *LAUNCHERS[script], "--dry-run=1", "x.py")
    assert code == 1 and "found the option '--dry-run=1'" in err
    code, _, err = run(script, *LAUNCHERS[script], "--[a-z]*", "x.py")
    assert code == 1 and "found the option '--[a-z]*'" in err


@pytest.mark.parametrize("script", ["torchrun.sh", "elastic.sh", "multinode.sh"])
def test_scripts_and_modules_are_passed_on_word_by_word(script: str) -> None:
    arguments = [*LAUNCHERS[f"launch/{script}"], "--nproc", "3"]
    words = _dry_run(f"launch/{script}", *arguments, "my train.py", "--lr", "0.1", "--help", "a;b")
    assert words[-5:] == ["my train.py", "--lr", "0.1", "--help", "a;b"]
    words = _dry_run(f"launch/{script}", *arguments, "-m", "some.module", "--nproc", "9")
    assert words[-4:] == ["-m", "some.module", "--nproc", "9"]
    assert words[-6:-4] != ["--nproc", "9"] and "3" in words
    assert _dry_run(f"launch/{script}", *arguments)[-1] == str(ROOT / "examples/digits.py")


@pytest.mark.parametrize("script", ["torchrun.sh", "elastic.sh", "multinode.sh"])
def test_a_script_that_is_not_there_is_refused(script: str) -> None:
    arguments = [*LAUNCHERS[f"launch/{script}"], "--nproc", "1", "no such.py", "--lr", "1"]
    code, _, err = run(f"launch/{script}", *arguments)
    assert code == 1 and "found no script 'no such.py'; expected a file, or -m" in err


def test_the_environment_is_set_where_the_user_did_not() -> None:
    cores = int(subprocess.run(["getconf", "_NPROCESSORS_ONLN"], capture_output=True).stdout)
    words = _dry_run("launch/torchrun.sh", "--nproc", "1")
    assert words[:2] == [f"OMP_NUM_THREADS={cores}", "NCCL_DEBUG=WARN"]
    assert words[2:5] == [sys.executable, "-m", "torch.distributed.run"]
    assert _dry_run("launch/torchrun.sh", "--nproc", "999")[0] == "OMP_NUM_THREADS=1"
    own = {"OMP_NUM_THREADS": "5", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "ib0"}
    words = _dry_run(
        "launch/multinode.sh", *LAUNCHERS["launch/multinode.sh"], "--nproc", "2", **own
    )
    assert words[:3] == ["OMP_NUM_THREADS=5", "NCCL_DEBUG=INFO", "GLOO_SOCKET_IFNAME=ib0"]
    assert "JDDIST_NPROC=" not in " ".join(words)
    words = _dry_run("launch/torchrun.sh", JDDIST_NPROC="6")
    assert _options(words)["--nproc-per-node"] == "6"


def test_elastic() -> None:
    found = _options(_dry_run("launch/elastic.sh", "--nproc", "2", "--max-restarts", "5"))
    assert found["--nnodes"] == "1:1" and found["--max-restarts"] == "5"
    assert found["--rdzv-endpoint"] == "localhost:0" and "--local-addr" not in found
    words = ["--nodes", "2:4", "--nproc", "2", "--endpoint", "127.0.0.1:29999", "--id", "exp"]
    found = _options(_dry_run("launch/elastic.sh", *words))
    assert found["--nnodes"] == "2:4" and found["--rdzv-endpoint"] == "127.0.0.1:29999"
    assert found["--rdzv-id"] == "exp" and found["--local-addr"] == "127.0.0.1"
    assert found["--rdzv-conf"] == "is_host=true"
    for wrong, message in [
        (["--nodes", "2:4"], "found no endpoint with --nodes 2:4"),
        (["--nodes", "4:2"], "expected MIN to be at most MAX"),
        (["--nodes", "4"], "expected MIN:MAX"),
        (["--max-restarts", "many"], "found --max-restarts 'many'"),
        (["--nodes", "1:2", "--endpoint", "no.such.host.invalid"], "found no address of the host"),
    ]:
        code, _, err = run("launch/elastic.sh", "--dry-run", "--nproc", "2", *wrong)
        assert code == 1 and message in err, err


def test_multinode_finds_its_place(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# the rack\n198.51.100.7 slots=8\n\n127.0.0.1  # this one\n198.51.100.8\n")
    words = _dry_run("launch/multinode.sh", "--hostfile", str(hostfile), "--nproc", "2")
    found = _options(words)
    assert found["--nnodes"] == "3" and found["--rdzv-endpoint"] == "198.51.100.7:29400"
    assert found["--rdzv-conf"] == "is_host=false,join_timeout=600"
    words = [
        "--hosts",
        "127.0.0.1,198.51.100.7",
        "--nproc",
        "2",
        "--port",
        "3000",
        "--timeout",
        "9",
    ]
    found = _options(_dry_run("launch/multinode.sh", *words))
    assert found["--rdzv-endpoint"] == "127.0.0.1:3000" and found["--local-addr"] == "127.0.0.1"
    assert found["--rdzv-conf"] == "is_host=true,join_timeout=9"
    by_list = _dry_run("launch/multinode.sh", *words[2:], JDDIST_HOSTS="127.0.0.1,198.51.100.7")
    assert _options(by_list) == found
    scheduler = {"MASTER_ADDR": "127.0.0.1", "NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": "3000"}
    assert _options(_dry_run("launch/multinode.sh", *words[2:], **scheduler)) == found
    scheduler["NODE_RANK"] = "1"
    found = _options(_dry_run("launch/multinode.sh", "--nproc", "2", **scheduler))
    assert found["--rdzv-conf"] == "is_host=false,join_timeout=600"


def test_multinode_by_ssh_prints_a_command_for_each_host() -> None:
    words = ["--hosts", "left,right", "--ssh", "--nproc", "2", "--dry-run", "my train.py", "a b"]
    code, out, err = run("launch/multinode.sh", *words, OMP_NUM_THREADS="3")
    assert code == 0, err
    for rank, (host, line) in enumerate(zip(("left", "right"), out.splitlines(), strict=True)):
        *ssh, name, command = shlex.split(line)
        assert ssh == ["ssh", "-tt"] and name == host
        remote = shlex.split(command)  # as the shell over there reads it
        assert "OMP_NUM_THREADS=3" in remote and remote[-2:] == ["my train.py", "a b"]
        assert _options(remote)["--node-rank"] == str(rank)
        assert _options(remote)["--hosts"] == "left,right"


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "these are missing: MASTER_ADDR, NNODES, NODE_RANK"),
        ([], {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}, "these are missing: NNODES"),
        ([], {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "2", "NNODES": "2"}, "found NODE_RANK=2"),
        (
            ["--hosts", "198.51.100.1,198.51.100.2"],
            {},
            "to be none of the hosts 198.51.100.1,198.51.100.2",
        ),
        (["--hosts", "127.0.0.1,127.0.0.2"], {}, "to be 2 of the hosts"),
        (["--hosts", "a, b"], {}, "expected names with commas between them"),
        (["--hosts", "127.0.0.1", "--node-rank", "1"], {}, "found the node rank 1 with 1 hosts"),
        (["--hosts", "no.such.host.invalid"], {}, "found no address of the host"),
        (["--hostfile", "/no/such/file"], {}, "found no file '/no/such/file'"),
        (["--hostfile", "/dev/null"], {}, "found no host in '/dev/null'"),
        (["--hosts", "a", "--hostfile", "b"], {}, "found both --hosts and --hostfile"),
        (["--ssh"], {"MASTER_ADDR": "a", "NODE_RANK": "0", "NNODES": "1"}, "without a list"),
        (["--hosts", "127.0.0.1", "--port", "x"], {}, "found --port 'x'"),
    ],
)
def test_multinode_says_what_is_missing(
    words: list[str], variables: dict[str, str], message: str
) -> None:
    code, _, err = run("launch/multinode.sh", "--nproc", "1", "--dry-run", *words, **variables)
    assert code == 1 and message in err, err


def test_a_python_without_torch_is_refused() -> None:
    code, _, err = run("launch/torchrun.sh", "--dry-run", JDDIST_RUN_PYTHON="/bin/false")
    assert code == 1 and "found no torch in /bin/false" in err


def test_slurm_derives_everything_from_the_job() -> None:
    words = _dry_run("launch/slurm.sbatch", "train.py", "--lr", "1", SLURM_GPUS_ON_NODE="8", **JOB)
    assert words[0] == "srun" and words[-3:] == ["train.py", "--lr", "1"]
    found = _options(words)
    assert found["--hosts"] == "n1,n2" and found["--nodes"] == "2" and found["--ntasks"] == "2"
    assert found["--port"] == "10007" and found["--id"] == "7" and found["--nproc"] == "8"
    words = _dry_run("launch/slurm.sbatch", "--nproc", "2", "--port", "5000", **JOB)
    found = _options(words)
    assert found["--port"] == "5000" and found["--nproc"] == "2"
    assert "--nproc" not in _dry_run("launch/slurm.sbatch", **JOB)


def test_slurm_runs_from_its_spool(tmp_path: Path) -> None:
    """SLURM copies the script elsewhere; the clone is where the job was submitted."""
    copy = tmp_path / "slurm_script"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", copy)
    code, _, err = run(str(copy), "--dry-run", cwd=tmp_path, **JOB)
    assert code == 1 and "found no launch/multinode.sh" in err and "JDDIST_HOME" in err
    for name in ("SLURM_SUBMIT_DIR", "JDDIST_HOME"):
        code, out, err = run(str(copy), "--dry-run", cwd=tmp_path, **JOB, **{name: str(ROOT)})
        assert code == 0 and str(ROOT / "launch/multinode.sh") in out, err


def test_slurm_says_what_is_missing() -> None:
    code, _, err = run("launch/slurm.sbatch", "--dry-run", SLURM_JOB_ID="7")
    assert code == 1 and "found no SLURM_JOB_NODELIST, SLURM_JOB_NUM_NODES" in err
    assert "sbatch launch/slurm.sbatch" in err
    three = {**JOB, "SLURM_JOB_NUM_NODES": "3"}
    code, _, err = run("launch/slurm.sbatch", "--dry-run", **three)
    assert code == 1 and "found 2 hosts in SLURM_JOB_NODELIST='n[1-2]'" in err


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("login", "login"),
        ("gpu[01-03,7],login", "gpu01,gpu02,gpu03,gpu7,login"),
        ("n[098-101]", "n098,n099,n100,n101"),
        ("r[1-2]n[08-09]x", "r1n08x,r1n09x,r2n08x,r2n09x"),
        ("a,b-c,d[5]", "a,b-c,d5"),
        ("127.0.0.[1-2]", "127.0.0.1,127.0.0.2"),
    ],
)
def test_lists_of_nodes(nodes: str, expected: str, tmp_path: Path) -> None:
    script = f". {ROOT}/launch/_slurm.sh; expand_node_list {shlex.quote(nodes)}"
    code, out, err = run("-euc", script)
    assert (code, out.strip()) == (0, expected), err
    if "[" not in nodes:
        return
    # Where there is a scontrol, it is the one to ask.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "x\\ny\\n"\n')
    scontrol.chmod(0o755)
    code, out, _ = run("-euc", script, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (code, out.strip()) == (0, "x,y")
