"""What to say if a framework is not installed."""

from __future__ import annotations

import importlib


def require(package: str, extra: str) -> None:
    """Imports a package that comes with an extra of jddist.

    Args:
        package: The package's name.
        extra: The extra that installs it.

    Raises:
        ImportError: It is missing (the message names the extra), or it fails to import.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise  # it is there, and misses something of its own
        raise ImportError(
            f"Found no package '{package}', which this part of jddist works with; expected it to "
            f'be installed. Run: pip install "jddist[{extra}]"',
            name=package,
        ) from error
