"""The named errors of jddist. On several ranks each of them is raised on every rank."""

from __future__ import annotations


class JddistError(Exception):
    """Base class of all errors of jddist's own."""


class LayoutMismatchError(JddistError, ValueError):
    """The ranks disagree on something that must be the same everywhere (it names each value)."""


class NonFiniteObjectiveError(JddistError, ValueError):
    """An objective or its gradient is NaN or infinite. No ``.grad`` was written."""


class RankError(JddistError, RuntimeError):
    """Some rank raised before the ranks exchanged anything (it names rank and cause)."""


class UnattachedParameterError(JddistError, RuntimeError):
    """Several ranks run, but it is unknown how these parameters are distributed over them."""


class UnsupportedModelError(JddistError, ValueError):
    """A module or wrapper with which the exact answer cannot be given (it names the fix)."""


class ModifiedInputError(JddistError, RuntimeError):
    """A tensor that a layer had read was changed in place before the Gramian was computed."""


class CheckpointError(JddistError, RuntimeError):
    """A checkpoint could not be written or read. The checkpoints before it are untouched."""


class StalledRankError(RankError):
    """A rank died, hangs or stopped, and the others waited in vain (it names rank and stage)."""
