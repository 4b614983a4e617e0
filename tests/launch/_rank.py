"""What the launchers' tests start: a rank that meets the others and writes down what it found.

    _rank.py FOLDER [--fail-once]

With --fail-once the last rank dies in the first attempt, so that a restart is needed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

VARIABLES = ("OMP_NUM_THREADS", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "LOCAL_RANK", "GROUP_RANK")


def main() -> None:
    """Meets the others; the sum over ranks shows that they talk to each other."""
    folder = Path(sys.argv[1])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    if "--fail-once" in sys.argv and attempt == 0 and rank == size - 1:
        os._exit(7)  # to leave a group that is in use may end in an abort instead
    found = {name: os.environ.get(name) for name in VARIABLES}
    found |= {"rank": rank, "size": size, "sum": total.item(), "attempt": attempt}
    (folder / f"attempt{attempt}-rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    time.sleep(0.2)  # see examples/digits.py


if __name__ == "__main__":
    main()
