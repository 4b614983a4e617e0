"""Monitoring: what steps are made of, recorded as they happen, plotted, and reported.

``Recorder`` watches an engine or aggregators and writes on rank 0. ``python -m jddist.monitoring
report RUN_DIR`` makes one HTML page of what it has written; ``jddist.monitoring.plots`` has the
figures.
"""

from .record import QUANTILES, Record, Session, Spread, Summary
from .recorder import Recorder, Watching
from .run import Run
from .sinks import JsonLines, Sink, TensorBoard
from .statistics import Statistics, statistics_of

__all__ = [
    "QUANTILES",
    "JsonLines",
    "Record",
    "Recorder",
    "Run",
    "Session",
    "Sink",
    "Spread",
    "Statistics",
    "Summary",
    "TensorBoard",
    "Watching",
    "statistics_of",
]
