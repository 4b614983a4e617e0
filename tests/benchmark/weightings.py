"""Times the weightings of m objectives against torchjd's, in one run, taking turns.

`python -m tests.benchmark.weightings` prints two tables: every Gramian method against torchjd, as a
ratio of medians, and UPGrad at many objectives, with its KKT residual.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchjd.aggregation as peer
from torch import Tensor

import jddist.aggregation as ours
from jddist.linalg import BatchedProjector
from jddist.linalg._complementarity import certificate
from jddist.linalg.gramian import normalize, regularize
from tests.unit.linalg._gramians import make_gramian

SIZES = [8, 32, 128, 256]
MANY = [512, 1024, 2048]
KINDS = ["well-conditioned", "low rank", "near duplicates", "conflicting", "strongly conflicting"]
# A second is enough to tell a ratio; the slowest of the peer's are measured once.
BUDGET_S = 1.0

PARAMETERS: dict[str, dict[str, Any]] = {
    "CAGrad": {"c": 0.5},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 2},
}


def methods(m: int) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Name -> our weighting and the peer's, both as functions of a Gramian [m, m]."""
    found = {}
    for name in ("Mean", "Sum", "Random", *gramian_methods()):
        parameters = dict(PARAMETERS.get(name, {}))
        if name == "NashMTL":
            parameters["n_tasks"] = m
        theirs = getattr(peer, f"{name}Weighting", None)
        if theirs is None:
            # The peer asks for a matrix: any with this Gramian will do.
            aggregator = getattr(peer, name)(**parameters)
            theirs_call = _on_root(aggregator.weighting if name == "NashMTL" else aggregator)
        else:
            theirs_call = theirs(**parameters)
        found[name] = (getattr(ours, f"{name}Weighting")(**parameters), theirs_call)
    return found


def gramian_methods() -> list[str]:
    """The methods of both libraries whose weights are a function of the Gramian."""
    aggregators = [
        name
        for name, value in vars(ours).items()
        if isinstance(value, type)
        and issubclass(value, ours.GramianWeightedAggregator)
        and value is not ours.GramianWeightedAggregator
    ]
    return sorted(name for name in aggregators if hasattr(peer, name))


def _on_root(weighting: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    roots: dict[int, Tensor] = {}

    def call(gramian: Tensor) -> Tensor:
        if id(gramian) not in roots:
            values, vectors = torch.linalg.eigh(gramian)
            roots[id(gramian)] = vectors * values.clamp_min(0.0).sqrt()
        return weighting(roots[id(gramian)])

    return call


def interleaved(calls: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each call; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # warm-up
    start = time.perf_counter()
    while not times[0] or time.perf_counter() - start < BUDGET_S:
        for call, measured in zip(calls, times, strict=True):
            before = time.perf_counter()
            call()
            measured.append(time.perf_counter() - before)
        if len(times[0]) >= 200:
            break
    return [statistics.median(measured) for measured in times]


def compare(sizes: list[int], kinds: list[str], dtype: torch.dtype) -> None:
    print("\nWeights from a Gramian: milliseconds, and how many times as long torchjd takes\n")
    print(f"{'method':12s}{'Gramian':24s}{'m':>6s}{'jddist':>12s}{'torchjd':>12s}{'ratio':>9s}")
    for m in sizes:
        for name, (mine, theirs) in methods(m).items():
            for kind in kinds if name in ("UPGrad", "DualProj") else kinds[:1]:
                gramian = make_gramian(kind, m).to(dtype)
                calls = [lambda w=mine, g=gramian: w(g), lambda w=theirs, g=gramian: w(g)]
                seconds = interleaved(calls)
                ratio = seconds[1] / seconds[0]
                print(
                    f"{name:12s}{kind:24s}{m:6d}{1e3 * seconds[0]:12.3f}{1e3 * seconds[1]:12.3f}"
                    f"{ratio:9.2f}",
                    flush=True,
                )


def many_objectives(sizes: list[int], kinds: list[str]) -> None:
    print("\nUPGrad of many objectives: first call of a fresh projector\n")
    print(f"{'Gramian':24s}{'m':>6s}{'seconds':>10s}{'KKT residual':>14s}{'by quadprog':>13s}")
    for m in sizes:
        for kind in kinds:
            gramian = make_gramian(kind, m)
            vectors = torch.eye(m, dtype=torch.float64) / m
            projector = BatchedProjector()
            start = time.perf_counter()
            weights = projector(vectors, gramian)
            seconds = time.perf_counter() - start
            problem = regularize(normalize(gramian, 0.0), projector.reg_eps)
            residual = float(certificate(problem, vectors.T, weights.T).max())
            print(
                f"{kind:24s}{m:6d}{seconds:10.2f}{residual:14.1e}{projector.fallbacks:13d}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--many", type=int, nargs="*", default=MANY)
    parser.add_argument("--kinds", nargs="*", default=KINDS, metavar="KIND")
    parser.add_argument("--threads", type=int, help="of torch's operations")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare(arguments.sizes, arguments.kinds, getattr(torch, arguments.dtype))
    many_objectives(arguments.many, arguments.kinds)


if __name__ == "__main__":
    main()
