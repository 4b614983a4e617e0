"""The command: ``python -m jddist.selftest``, or ``torchrun ... -m jddist.selftest``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence

import torch

from .collectives import collective_checks
from .ranks import CannotJoinError, Ranks, join, leave
from .report import as_json, succeeded, table
from .runner import Progress, finish, run
from .training import training_checks
from .watchdog import EXIT_CODE, Watchdog
from .wrappers import DEFAULT, WRAPPERS

_DESCRIPTION = f"""
Checks this machine, or this cluster, and its backend: the collectives that jddist uses, and the
training of a small model in each wrapper, against one process that computes every row of the
Jacobian by itself. Start it as you start your training:

  python -m jddist.selftest
  torchrun --standalone --nproc-per-node 4 -m jddist.selftest

Rank 0 prints what was checked, with errors and times. Exit code: 0 if all is well, 1 if a check
failed, 2 if the ranks could not meet, {EXIT_CODE} if the checks did not end in time.
"""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jddist.selftest",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", help="nccl, gloo, ... (default: nccl with a GPU per rank)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: as the backend needs)")
    parser.add_argument(
        "--wrappers",
        nargs="+",
        choices=list(WRAPPERS),
        default=list(DEFAULT),
        help=f"(default: {' '.join(DEFAULT)}; what is not installed is skipped)",
    )
    parser.add_argument(
        "--alone", action="store_true", help="check this process, whatever torchrun has set"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="after which everything ends, hung or not (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    if not 1 <= parsed.timeout < 1e6:
        parser.error(f"found --timeout {parsed.timeout}; expected seconds, 1 or more")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; the exit code."""
    args = _parse(arguments)
    started = time.monotonic()
    progress = Progress()
    joined: list[Ranks] = []

    def show() -> None:
        seconds = time.monotonic() - started
        form = as_json if args.json else table
        if joined and joined[0].rank == 0 and progress.results:
            print(form(progress.results, joined[0], seconds), flush=True)

    def hung() -> None:
        who = f"rank {joined[0].rank} on {joined[0].host}" if joined else "this process"
        print(
            f"jddist.selftest: {who} found no end of '{progress.current}' within "
            f"{args.timeout:.0f} s; expected seconds. The stack follows.",
            file=sys.stderr,
        )
        show()

    with Watchdog(args.timeout, hung):
        torch.set_num_threads(1)
        try:
            # Half of the time is left for the ranks to tell each other of a collective that hung.
            ranks = join(args.backend, args.device, args.timeout / 2, alone=args.alone)
        except CannotJoinError as error:
            print(f"jddist.selftest: {error}", file=sys.stderr)
            return 2
        joined.append(ranks)
        checks = [*collective_checks(), *training_checks(args.wrappers)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of its own wrappers
            run(ranks, checks, progress)
        show()
        finish(ranks)
        leave()
    return 0 if succeeded(progress.results) else 1


if __name__ == "__main__":
    sys.exit(main())
