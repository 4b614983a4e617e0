"""Every Python snippet of the README runs, one after the other, in one process and on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from tests._ranks import run_ranks

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def _run_snippets(rank: int, world_size: int) -> list[str]:
    """The snippets form one program; the harness has a group already, and ends it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dist, "init_process_group", lambda *_: None)
        monkeypatch.setattr(dist, "destroy_process_group", lambda *_: None)
        names: dict[str, object] = {}
        for snippet in SNIPPETS:
            exec(compile(snippet, "README.md", "exec"), names)
    return sorted(name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_snippets_run(world_size: int) -> None:
    assert len(SNIPPETS) >= 3
    for names in run_ranks(_run_snippets, world_size):
        assert {"engine", "weights", "gramian"} <= set(names)


def test_the_first_example_is_short() -> None:
    """Twelve lines from the model to the step, beside the imports."""
    lines = [line for line in SNIPPETS[0].splitlines() if line.strip()]
    code = [line for line in lines if not line.startswith(("import", "from"))]
    assert len(code) <= 13
