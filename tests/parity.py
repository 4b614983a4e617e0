"""Prints how the methods compare with torchjd: `python -m tests.parity [-v] [name ...]`.

It fails if a difference is above its limit, a paper's condition is missed, or a method was never
compared. `-v` lists the excluded calls and why.
"""

from __future__ import annotations

import sys

from tests.unit.aggregation._parity import DTYPES, row, summarize, table
from tests.unit.aggregation._parity_methods import METHODS
from tests.unit.aggregation._parity_stateful import AGGREGATORS, TWO_BATCHES, compare_stateful


def compare_sequences(label: str) -> tuple[str, list[str]]:
    """The line of a method that is compared over calls in a row, and what is wrong with it."""
    try:
        outcomes = [compare_stateful(label, dtype) for dtype in DTYPES]
    except AssertionError as error:
        return f"{label:24} FAILED", [f"{label}: {error}"]
    compared = sum(outcome[0] for outcome in outcomes)
    excluded = sum(len(outcome[1]) for outcome in outcomes)
    problems = [] if all(outcome[0] for outcome in outcomes) else [f"{label} was never compared"]
    return row(label, compared, excluded, [outcome[2] for outcome in outcomes]), problems


def main(arguments: list[str]) -> int:
    names = {argument for argument in arguments if not argument.startswith("-")}
    methods = [m for m in METHODS if not names or names & {m.name, m.label}]
    sequences = [s for s in (*AGGREGATORS, *TWO_BATCHES) if not names or s in names]
    unknown = names - {n for m in methods for n in (m.name, m.label)} - set(sequences)
    if unknown:
        print(f"No such method: {', '.join(sorted(unknown))}.")
        return 2
    problems: list[str] = []
    print(table(methods))
    for label in sequences:
        line, wrong = compare_sequences(label)
        print(line)
        problems += wrong
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
