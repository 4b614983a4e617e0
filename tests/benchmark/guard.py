"""Fails if a step has become slower than it was: the speed table against recorded ratios.

    python -m tests.benchmark.guard [--models mlp256 cnn] [--record]

A ratio to a plain step may be 1.3 times the one in recorded.json, which may not itself be worse
than the project's bound. A model that fails is measured once more, longer: other processes on the
machine disturb the short run. No part of the test suite, since it measures time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from .engine import measure
from .models import MODELS

TOLERANCE = 1.3
_RECORDED = Path(__file__).with_name("recorded.json")
_VARIANTS = ("book-keeping", "second backward")
_REPEATS = (5, 15)

Ratios = dict[str, float]


def ratios(name: str, repeats: int) -> Ratios:
    """The median ratio to a plain step of each variant."""
    times = measure(MODELS[name], ["plain", *_VARIANTS], repeats)
    plain = statistics.median(times["plain"])
    return {variant: statistics.median(times[variant]) / plain for variant in _VARIANTS}


def read() -> dict[str, Ratios]:
    """The recorded ratios of each model."""
    found: dict[str, Ratios] = json.loads(_RECORDED.read_text())
    return found


def slower(found: Mapping[str, float], recorded: Mapping[str, float]) -> list[str]:
    """The variants that are slower than the tolerance allows."""
    return [v for v in _VARIANTS if found[v] > TOLERANCE * recorded[v]]


def _as_text(name: str, found: Mapping[str, float], recorded: Mapping[str, float]) -> str:
    cells = [f"{v} {found[v]:.2f} (recorded {recorded[v]:.2f})" for v in _VARIANTS]
    return f"{name:<16} " + ", ".join(cells)


def _check(names: list[str]) -> bool:
    """Whether none of the models has become slower."""
    recorded = read()
    failed = []
    for name in names:
        for repeats in _REPEATS:
            found = ratios(name, repeats)
            print(_as_text(name, found, recorded[name]), flush=True)
            late = slower(found, recorded[name])
            if not late:
                break
        if late:
            failed.append(f"{name} ({', '.join(late)})")
    if failed:
        print(f"slower than {TOLERANCE} times the recorded ratio: {'; '.join(failed)}")
    return not failed


def _record(names: list[str]) -> bool:
    """Whether all models meet the bound, so that their ratios could be recorded."""
    recorded = read()
    kept = True
    for name in names:
        found = ratios(name, _REPEATS[-1])
        print(_as_text(name, found, recorded[name]), flush=True)
        bounds = dict(zip(_VARIANTS, MODELS[name].must, strict=True))
        worse = [f"{v} {found[v]:.2f} > {bounds[v]}" for v in _VARIANTS if found[v] > bounds[v]]
        if worse:
            print(f"{name} is not recorded: {', '.join(worse)}")
            kept = False
        else:
            recorded[name] = {v: round(found[v], 2) for v in _VARIANTS}
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in recorded.items())
    _RECORDED.write_text(f"{{\n{rows}\n}}\n")
    return kept


def main() -> int:
    """The exit code: 1 if a model has become slower, or is too slow to be recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--record", action="store_true", help="replace the recorded ratios")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = (_record if arguments.record else _check)(arguments.models)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
