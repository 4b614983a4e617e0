"""The guard of the speed table, without measuring any time."""

from __future__ import annotations

import pytest

from tests.benchmark import guard
from tests.benchmark.models import MODELS


def test_recorded_ratios_meet_the_bounds() -> None:
    recorded = guard.read()
    assert recorded.keys() == MODELS.keys()
    for name, model in MODELS.items():
        assert recorded[name]["book-keeping"] <= model.must[0]
        assert recorded[name]["second backward"] <= model.must[1]


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.29, 0), (1.31, 1)])
def test_exit_code(
    factor: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[tuple[str, int]] = []

    def measured(name: str, repeats: int) -> dict[str, float]:
        runs.append((name, repeats))
        ratios = dict(guard.read()[name])
        if name == "cnn":
            ratios["second backward"] *= factor
        return ratios

    monkeypatch.setattr(guard, "ratios", measured)
    monkeypatch.setattr("sys.argv", ["guard", "--models", "mlp256", "cnn"])
    assert guard.main() == code
    text = capsys.readouterr().out
    if code:
        assert "cnn (second backward)" in text and "mlp256 (" not in text
        assert [name for name, _ in runs] == ["mlp256", "cnn", "cnn"]  # measured again first
    else:
        assert "slower" not in text
