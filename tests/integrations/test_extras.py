"""Frameworks are extras: jddist imports none of them, and names the extra that is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In a process of its own: what other tests have imported must not help.
SCRIPT = """
import importlib, pkgutil, sys

FRAMEWORKS = ["accelerate", "lightning", "transformers", "deepspeed", "matplotlib", "tensorboard"]
import jddist

for part in ("aggregation", "autogram", "autojac", "distribution", "grouping", "integrations",
             "integrations.comm_hook", "linalg", "scalarization"):
    importlib.import_module(f"jddist.{part}")
print("imported:", [name for name in FRAMEWORKS if name in sys.modules])
for missing, module, extra in (
    ("accelerate", "accelerate", "accelerate"),
    ("lightning", "lightning", "lightning"),
    ("transformers", "transformers", "transformers"),
    ("accelerate", "transformers", "transformers"),
):
    sys.modules[missing] = None  # as if it were not installed
    # Present, so that it is not what is missing; not imported, since that takes seconds.
    sys.modules.setdefault("transformers", sys)
    try:
        importlib.import_module(f"jddist.integrations.{module}")
    except ImportError as error:
        print(missing, f'pip install "jddist[{extra}]"' in str(error), error.name)
    del sys.modules[missing]
    sys.modules.pop("transformers", None)
"""


def test_frameworks_are_imported_on_demand_and_a_missing_one_is_named() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "imported: []",
        "accelerate True accelerate",
        "lightning True lightning",
        "transformers True transformers",
        "accelerate True accelerate",
    ]
