"""Ends a process that hangs, whatever it hangs in."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable

EXIT_CODE = 3
"""The exit code of a process that did not end in time."""

# For a hang that holds Python's lock, where no thread of Python can act.
_LAST_RESORT = 5.0


class Watchdog:
    """Ends the process with ``EXIT_CODE`` after a while, saying where it was.

    Args:
        seconds: How long everything may take.
        report: Called first, to say what is known so far.
    """

    def __init__(self, seconds: float, report: Callable[[], None]) -> None:
        self._seconds = seconds
        self._report = report
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Watchdog:
        self._timer.start()
        faulthandler.dump_traceback_later(self._seconds + _LAST_RESORT, exit=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        try:
            self._report()
            faulthandler.dump_traceback()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(EXIT_CODE)
