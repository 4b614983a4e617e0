"""The methods that need nothing but G or the number of rows, as compared with torchjd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.unit.aggregation import _conditions as conditions
from tests.unit.aggregation._parity import Method
from tests.unit.linalg.test_dual_cone import one_by_one

ROUNDING = "a few roundings, times m at most"


class PlainProjector:
    """Stands in for torchjd's projector, whose solver package may be missing."""

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        return one_by_one(U.reshape(-1, U.shape[-1]), G).reshape(U.shape).to(G)


def preference(m: int) -> Tensor:
    return torch.linspace(0.1, 2.0, m)


def always(**parameters: Any) -> Callable[[int], Mapping[str, Any]]:
    return lambda m: parameters


def _projected(name: str) -> list[Method]:
    why = "some ten roundings; reg_eps = 1e-4 amplifies those of the last one in float32 only"
    return [
        Method(
            name,
            name,
            (1e-12, 1e-6),
            why,
            of_matrix=True,
            n_permutations=0,
            peer_parameters=always(projector=PlainProjector()),
        ),
        Method(
            f"{name}(pref)",
            name,
            (1e-12, 1e-6),
            why,
            of_matrix=True,
            n_permutations=0,
            parameters=lambda m: {"pref_vector": preference(m)},
            peer_parameters=lambda m: {
                "pref_vector": preference(m),
                "projector": PlainProjector(),
            },
        ),
    ]


def _aligned(mode: str, scale: Callable[[Tensor], Tensor]) -> Method:
    return Method(
        f"AlignedMTL({mode})",
        "AlignedMTL",
        (1e-10, 1e-3),
        "rounding of G over its least eigenvalue that is kept, with condition numbers up to 1e4",
        parameters=always(scale_mode=mode),
        condition=conditions.aligned(scale),
        condition_limits=(1e-4, 1e-2),
    )


def _krum(n_byzantine: int, n_selected: int, sizes: tuple[int, ...]) -> Method:
    return Method(
        f"Krum({n_byzantine}, {n_selected})",
        "Krum",
        (1e-15, 1e-6),
        "the same rows are selected; their average is rounded",
        parameters=always(n_byzantine=n_byzantine, n_selected=n_selected),
        sizes=sizes,
        n_permutations=4,
        condition=conditions.closest_rows(n_byzantine, n_selected),
        condition_limits=(1e-12, 1e-3),
    )


def _fairgrad(alpha: float) -> Method:
    return Method(
        f"FairGrad({alpha})",
        "FairGrad",
        (1e-6, 1e-4),
        "torchjd's least squares stops at 1e-8, ill-conditioned to 1e-6; rounding of G in float32",
        parameters=always(alpha=alpha),
        calls=lambda kind: 1,
        condition=conditions.fair(alpha),
        condition_limits=(1e-6, 1e-2),
        peer_limits=(1e-6, 1e-3),
        n_seeds=1,  # torchjd takes seconds where it does not converge.
    )


def _cagrad(c: float) -> Method:
    return Method(
        f"CAGrad({c})",
        "CAGrad",
        (1e-3, 1e-3),
        "torchjd's solver leaves an objective error of 1e-8, which is its root in the vector",
        parameters=always(c=c),
        calls=lambda kind: 1,
        condition=conditions.conflict_averse(c, 1e-4),
        condition_limits=(1e-7, 1e-4),
        peer_limits=(1e-6, 1e-4),
        n_seeds=2,
    )


def _pcd(tau: float, beta: float, eps: float) -> Method:
    return Method(
        f"PCD({tau}, {beta})",
        "PCD",
        (1e-9, 1e-4),
        "rounding of G over what counts as dependent: 1e-9, and 10 eps in float32",
        parameters=always(tau=tau, beta=beta, eps=eps),
        condition=conditions.prioritized(tau, eps),
        condition_limits=(1e-8, 1e-3),
    )


METHODS = [
    Method("Mean", "Mean", (1e-12, 1e-6), ROUNDING, of_matrix=True, n_permutations=0),
    Method("Sum", "Sum", (1e-12, 1e-6), ROUNDING, of_matrix=True, n_permutations=0),
    Method("Random", "Random", (1e-12, 1e-6), ROUNDING, of_matrix=True, n_permutations=0),
    *_projected("UPGrad"),
    *_projected("DualProj"),
    Method(
        "MGDA",
        "MGDA",
        (1e-12, 1e-6),
        "of several optimal weights rounding picks one: the vector's length is unique",
        of_matrix=True,
        n_permutations=0,
        measure=lambda vector: vector.norm()[None],
    ),
    Method("PCGrad", "PCGrad", (1e-12, 1e-6), ROUNDING, of_matrix=True, n_permutations=0),
    Method(
        "GradVac",
        "GradVac",
        (1e-12, 1e-6),
        ROUNDING,
        # torchjd's is 5e-9 off after one call on rank 1, and after two on rank 2 by any factor: see
        # test_by_vectors.py, where ours is compared with the paper's algorithm instead.
        calls=lambda kind: {"rank 1": 0, "rank 2": 1}.get(kind, 3),
        of_matrix=True,
        n_permutations=0,
    ),
    _aligned("min", lambda values: values[-1]),
    _aligned("median", lambda values: values.median()),
    _aligned("rmse", lambda values: values.mean()),
    Method(
        "IMTLG",
        "IMTLG",
        (1e-9, 1e-4),
        "rounding of G over its least eigenvalue that is kept",
        condition=conditions.equal_projections,
        condition_limits=(1e-6, 1e-2),
        peer_limits=(1e-7, 1e-2),
    ),
    _krum(0, 1, (4, 7)),
    _krum(1, 1, (4, 7)),
    _krum(1, 3, (4, 7)),
    Method("FairGrad(0)", "FairGrad", (1e-14, 1e-6), ROUNDING, parameters=always(alpha=0.0)),
    _fairgrad(0.5),
    _fairgrad(1.0),
    _fairgrad(2.0),
    _cagrad(0.5),
    _cagrad(2.0),
    Method(
        "NashMTL",
        "NashMTL",
        (1e-5, 1e-4),
        "torchjd stops at a residual of 1e-3, then within the square of it in most cases",
        parameters=lambda m: {"n_tasks": m},
        calls=lambda kind: 1,
        condition=conditions.bargained(1.0),
        condition_limits=(1e-5, 1e-2),
        peer_limits=(1e-5, 1e-3),
        n_seeds=2,
    ),
    Method(
        "ConFIG",
        "ConFIG",
        (1e-10, 1e-4),
        "rounding of the cosines over the square of the unit rows' least singular value",
        condition=conditions.equal_angles(None),
        condition_limits=(1e-7, 1e-3),
        peer_limits=(1e-7, 1e-3),
    ),
    _pcd(0.02, 0.999, 1e-8),
    _pcd(0.5, 0.5, 0.0),
]
