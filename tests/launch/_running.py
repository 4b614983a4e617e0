"""Starts a launcher as a user does, and ends all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANK = str(ROOT / "tests" / "launch" / "_rank.py")

# What the launchers read or set: a test has none of it but what it sets itself.
_READ = (
    *("JDDIST_NPROC", "JDDIST_HOSTS", "JDDIST_ENDPOINT", "JDDIST_IMAGE", "JDDIST_SSH"),
    *("MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "RANK", "WORLD_SIZE", "JDDIST_HOME"),
    *("OMP_NUM_THREADS", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME"),
)


def environment(**variables: str) -> dict[str, str]:
    """A clean environment, with this Python for the ranks."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _READ and not name.startswith(("SLURM_", "PET_", "TORCHELASTIC_"))
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept |= {"JDDIST_RUN_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return kept | variables


def start(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """Starts ``bash WORDS`` in a process group of its own."""
    return subprocess.Popen(
        ["bash", *words],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 150) -> tuple[int, str, str]:
    """Waits for it; the exit code and what it wrote. Nothing of its group is left over."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all of it has ended
        process.wait()
    return process.returncode, out, err


def run(*words: str, cwd: Path = ROOT, **variables: str) -> tuple[int, str, str]:
    """Runs ``bash WORDS``."""
    return finish(start(*words, cwd=cwd, **variables))
