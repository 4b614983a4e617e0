"""Prints how the methods compare with torchjd: `python -m tests.parity [name ...]`."""

from __future__ import annotations

import sys
from importlib import import_module

from tests.unit.aggregation._parity import Method, summarize, table

# Each has a list METHODS.
SUITES = ["tests.unit.aggregation._parity_methods"]


def all_methods() -> list[Method]:
    """The methods of all suites."""
    return [method for suite in SUITES for method in import_module(suite).METHODS]


def main(names: list[str]) -> int:
    methods = [m for m in all_methods() if not names or m.name in names or m.label in names]
    print(table(methods))
    outcomes = {method.label: summarize(method) for method in methods}
    for label, outcome in outcomes.items():
        for failure in outcome.failures:
            print("FAILED", failure)
        if outcome.compared == 0:
            print("FAILED", label, "was never compared")
    if "-v" in sys.argv:
        for outcome in outcomes.values():
            for exclusion in outcome.exclusions:
                print(f"excluded {exclusion.cell}: {exclusion.reason}")
    return int(any(outcome.failures or not outcome.compared for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main([name for name in sys.argv[1:] if not name.startswith("-")]))
