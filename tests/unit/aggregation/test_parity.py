"""The same numbers and the same random draws as torchjd, on every kind of matrix."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import jddist.aggregation as ours
from tests import parity
from tests.unit.aggregation._matrices import KINDS, make_matrix
from tests.unit.aggregation._parity import DTYPES, Method, compare
from tests.unit.aggregation._parity_methods import METHODS, PlainProjector

peer = pytest.importorskip("torchjd.aggregation")


def assert_same_vector(actual: Tensor, expected: Tensor, matrix: Tensor) -> None:
    # Some ten roundings on numbers of the size of J (times m at most).
    assert float((actual - expected).norm()) <= 1e-12 * float(matrix.norm() + expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_aggregators(method: Method, kind: str) -> None:
    assert compare(method, kind).failures == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_no_method_goes_uncompared(method: Method) -> None:
    # Full rank, no zeros: where every method has an answer, in both packages.
    assert compare(method, "random").compared > 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_weightings(method: Method) -> None:
    if method.name == "ConFIG":
        pytest.skip("torchjd has no weighting for it")
    for m in method.sizes:
        for dtype in DTYPES:
            if method.name == "NashMTL" and m == 1:
                continue  # torchjd cannot.
            if method.name == "Krum" and dtype == torch.float32:
                continue  # Its ties are torn by rounding, which is not the same here.
            matrix = make_matrix("conflicting", m, seed=5)
            gramian = (matrix @ matrix.T).to(dtype)
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = method.make_peer(m).weighting(matrix.to(dtype))
            torch.manual_seed(0)
            actual = getattr(ours, method.name + "Weighting")(**method.parameters(m))(gramian)
            # The peer squares the rounded J, not J: one more rounding, amplified by the condition
            # of G or by 1 / reg_eps, which is at most 1e4.
            limit = max(method.limits[0], 1e-10) if dtype == torch.float64 else 1e-3
            assert actual.dtype == dtype
            assert_close(actual, expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("name", ["UPGrad", "DualProj", "AlignedMTL", "ConFIG"])
def test_preference_vector(name: str) -> None:
    matrix = make_matrix("conflicting", 4, seed=1)
    preference = torch.tensor([0.1, 2.0, 0.0, 1.0], dtype=torch.float64)
    projector = {"projector": PlainProjector()} if name in ("UPGrad", "DualProj") else {}
    expected = getattr(peer, name)(preference, **projector)(matrix)
    assert_same_vector(getattr(ours, name)(preference)(matrix), expected, matrix)


@pytest.mark.parametrize("name", sorted({method.name for method in METHODS}))
def test_signatures(name: str) -> None:
    def parameters(cls: type) -> dict[str, Any]:
        found = dict(inspect.signature(cls).parameters)
        # Ours alone; by keyword, so that no call of the peer's means something else.
        generator = found.pop("generator", None)
        if generator is not None:
            assert generator.kind is generator.KEYWORD_ONLY and generator.default is None
        return {p.name: p.default for p in found.values()}

    if name not in ("UPGrad", "DualProj"):  # Their projectors are compared in test_dual_cone.
        assert parameters(getattr(ours, name)) == parameters(getattr(peer, name))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_texts(method: Method) -> None:
    if method.peer_parameters is None and method.name not in ("UPGrad", "DualProj"):
        mine, theirs = method.make_mine(4), method.make_peer(4)
        assert str(mine) == str(theirs)
        assert repr(mine) == repr(theirs)


def test_nashmtl_over_several_calls() -> None:
    parameters = {"n_tasks": 3, "max_norm": 0.5, "update_weights_every": 3}
    mine, theirs = ours.NashMTL(**parameters), peer.NashMTL(**parameters)
    for seed in range(7):
        matrix = make_matrix("random", 3, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(matrix)
        # torchjd stops at a residual of 1e-3, which one more Newton step would square.
        assert_close(mine(matrix), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wrong", "what"), [(1.0 + 1e-11, "differs"), (torch.nan, "differs")])
def test_the_comparison_can_fail(wrong: float, what: str) -> None:
    class Wrong(Method):
        def make_mine(self, m: int) -> nn.Module:
            aggregator = ours.Mean()
            aggregator.register_forward_hook(lambda *args: wrong * args[-1])
            return aggregator

    outcome = compare(Wrong("Mean", "Mean", (1e-12, 1e-12), "a test", n_permutations=0), "random")
    assert outcome.compared > 0
    assert outcome.failures
    assert all(what in failure for failure in outcome.failures)


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity.main(["Mean"]) == 0
    assert "Mean                          504        0" in capsys.readouterr().out
    assert parity.main(["Median"]) == 2
    never = Method("Mean", "Mean", (1.0, 1.0), "a test", sizes=())
    monkeypatch.setattr(parity, "METHODS", [never])
    assert parity.main(["Mean"]) == 1
    assert "never compared" in capsys.readouterr().out
    assert parity.main(["TrimmedMean"]) == 0
    assert "TrimmedMean                   168        0" in capsys.readouterr().out
    monkeypatch.setattr(parity, "compare_stateful", lambda name, dtype: (0, [], 0.0))
    assert parity.main(["TrimmedMean"]) == 1
    assert "never compared" in capsys.readouterr().out


def test_excluded_cells_need_a_condition() -> None:
    # Of two equal scores rounding picks one, so no cell passes with this limit.
    method = Method("MGDA", "MGDA", (0.0, 0.0), "a test")
    outcome = compare(method, "conflicting")
    assert outcome.exclusions
    assert any("no condition" in failure for failure in outcome.failures)


def test_hyperparameters() -> None:
    matrix = make_matrix("conflicting", 4, seed=1)
    for name, parameters in [
        ("MGDA", {"epsilon": 0.2, "max_iters": 3}),
        ("MGDA", {"epsilon": 1e-9, "max_iters": 1000}),
        ("GradVac", {"beta": 0.9, "eps": 1e-3}),
    ]:
        mine, theirs = getattr(ours, name)(**parameters), getattr(peer, name)(**parameters)
        for seed in range(3):
            torch.manual_seed(seed)
            expected = theirs(matrix)
            torch.manual_seed(seed)
            assert_same_vector(mine(matrix), expected, matrix)


@pytest.mark.parametrize("kind", ["rank 1", "rank 2"])
def test_torchjds_gradvac_depends_on_rounding_on_low_rank(kind: str) -> None:
    """Why parity stops there: the order of the columns changes torchjd's result.

    A turned row loses its length, or falls into the line of another one: of its square, taken from
    the Gramian, and of the sine, taken from the cosine, rounding is all that is left.
    """
    disagreement = 0.0
    for seed in range(40):
        matrix = make_matrix(kind, 7, seed).float()
        lengths = []
        for columns in (matrix, matrix.flip(1)):
            theirs = peer.GradVac()
            for call in range(3):
                torch.manual_seed(call)
                result = theirs(columns)
            lengths.append(result.norm())
        disagreement = max(disagreement, float((lengths[0] - lengths[1]).abs() / lengths[0]))
    assert disagreement > 1e-4
