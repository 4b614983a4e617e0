"""Prints how the methods compare with torchjd: `python -m tests.parity [-v] [name ...]`.

It fails if a difference is above its limit, a paper's condition is missed, or a method was never
compared. `-v` lists the excluded calls and why.
"""

from __future__ import annotations

import sys
from importlib import import_module

from tests.unit.aggregation._parity import Method, summarize, table

# Each has a list METHODS.
SUITES = ["tests.unit.aggregation._parity_methods"]


def all_methods() -> list[Method]:
    """The methods of all suites."""
    return [method for suite in SUITES for method in import_module(suite).METHODS]


def main(arguments: list[str]) -> int:
    names = {argument for argument in arguments if not argument.startswith("-")}
    methods = [m for m in all_methods() if not names or names & {m.name, m.label}]
    unknown = names - {n for m in methods for n in (m.name, m.label)}
    if unknown:
        print(f"No such method: {', '.join(sorted(unknown))}.")
        return 2
    print(table(methods))
    problems: list[str] = []
    for method in methods:
        outcome = summarize(method)
        problems += outcome.failures
        if outcome.compared == 0:
            problems.append(f"{method.label} was never compared")
        if "-v" in arguments:
            for exclusion in outcome.exclusions:
                print(f"excluded {exclusion.cell}: {exclusion.reason}")
    for problem in problems:
        print("FAILED", problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
