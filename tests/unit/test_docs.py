"""Every Python snippet of the README and of docs/ runs, in one process and on two ranks.

Shell snippets are parsed, and what they call is there and knows the options.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jddist import scalarization
from tests._ranks import run_ranks

ROOT = Path(__file__).parents[2]
PAGES = [
    *(Path("README.md"), Path("CONTRIBUTING.md")),
    *sorted(p.relative_to(ROOT) for p in (ROOT / "docs").rglob("*.md")),
]


def _snippets(page: Path, language: str = "python") -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


PROGRAMS = [page for page in PAGES if _snippets(page)]
# Of which nothing is checked but how they are written.
COMMANDS = {"sbatch", "torchrun", "deepspeed", "accelerate", "tensorboard", "python", "export"}
SHELL_LINES = [
    line for page in PAGES for text in _snippets(page, "sh") for line in text.split("\n")
]


def _run_snippets(rank: int, world_size: int, page: Path, folder: str) -> list[str]:
    """The snippets form one program; the harness has a group already, and ends it."""
    os.chdir(folder)  # some write files
    names = _names_of_program(page, rank)
    return sorted(name for name in names if not name.startswith("_"))


def _names_of_program(page: Path, rank: int) -> dict[str, object]:
    torch.manual_seed(rank)  # other samples on every rank
    names: dict[str, object] = {"__name__": page.stem}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dist, "init_process_group", lambda *_: None)
        monkeypatch.setattr(dist, "destroy_process_group", lambda *_: None)
        for snippet in _snippets(page):
            exec(compile(snippet, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("page", PROGRAMS, ids=str)
def test_the_snippets_run(page: Path, world_size: int, tmp_path: Path) -> None:
    expected = {
        Path("README.md"): {"engine", "weights", "gramian", "errors", "accumulation"},
        Path("docs/checkpointing.md"): {"loaded", "names", "stop", "moco"},
        Path("docs/troubleshooting.md"): {"message"},
        Path("docs/methods.md"): {"factor", "resumed", "condition", "scalar", "wrapped"},
    }
    for names in run_ranks(_run_snippets, world_size, page, str(tmp_path)):
        assert expected.get(page, set()) <= set(names)


def test_pages_that_show_how_have_snippets() -> None:
    guides = {"getting_started", "concepts", "migration", "layer_rules", "scaling", "methods"}
    assert guides | {"README"} <= {page.stem for page in PROGRAMS}
    assert len(_snippets(PAGES[0])) >= 3


def test_languages_of_snippets() -> None:
    """What is neither Python nor shell would go untested."""
    known = {"python", "sh", "text", "json", "yaml"}
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
        languages = {name for name in fences[::2] if not name.startswith("{")}
        assert languages <= known and not any(fences[1::2]), page


@pytest.mark.parametrize("line", sorted(set(filter(None, SHELL_LINES))))
def test_shell_snippets(line: str) -> None:
    """Launchers are run as --dry-run; other commands are looked up."""
    subprocess.run(["bash", "-n"], input=line, text=True, check=True, timeout=20)
    words = shlex.split(line, comments=True)
    scripts = [word for word in words if word.startswith("launch/")]
    for script in scripts:
        assert (ROOT / script).exists()
    if scripts and words[0] == "bash":
        text = (ROOT / scripts[0]).read_text()
        if "--dry-run" in text:
            command = ["bash", words[1], "--dry-run", *words[2:]]
            env = {**os.environ, "JDDIST_RUN_PYTHON": sys.executable}
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
            assert result.returncode == 0, result.stderr
        else:
            options = [word for word in words[2:] if word.startswith("--") and word != "--"]
            assert all(option in text for option in options)
    elif "-m" in words[1:]:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    elif words[0] == "docker":
        files = [words[i + 1] for i, word in enumerate(words) if word == "-f"]
        assert all((ROOT / name).exists() for name in files)
    elif words[:2] == ["pip", "install"]:
        held = [words[i + 1] for i, word in enumerate(words) if word == "-c"]
        assert all((ROOT / name).exists() for name in held)
    else:
        assert words[0] in COMMANDS, line


def test_the_first_example_is_short() -> None:
    """Twelve lines from the model to the step, beside the imports."""
    lines = [line for line in _snippets(PAGES[0])[0].splitlines() if line.strip()]
    code = [line for line in lines if not line.startswith(("import", "from"))]
    assert len(code) <= 13


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page.parent / target).exists(), target


COUNTS = [5, 2, 0]
ARGUMENTS = {"STCH": {"mu": 0.3}, "GeometricMean": {}, "FAMO": {"shape": 3}, "UW": {"shape": 3}}


def _scalarized_gradient(rank: int, world_size: int, name: str) -> list[Tensor]:
    """As the methods page says: one step of DDP with global losses, and of one process."""
    over_ranks = _names_of_program(Path("docs/methods.md"), rank)["over_ranks"]
    assert callable(over_ranks)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, dtype=torch.float64)
    data = torch.randn(sum(COUNTS), 4, dtype=torch.float64)
    plain = getattr(scalarization, name)(**ARGUMENTS[name]).double()
    plain(model(data).square().mean(dim=0)).backward()
    expected = [p.grad.clone() for p in [*model.parameters(), *plain.parameters()]]
    model.zero_grad()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = data.split(COUNTS)[rank]
    scalarizer = getattr(scalarization, name)(**ARGUMENTS[name]).double()
    # The mean of no samples would be NaN.
    losses = wrapped(mine).square().sum(dim=0) / max(len(mine), 1)
    values = over_ranks(losses, count=len(mine))
    scalarizer(values).backward()
    found = [p.grad for p in [*model.parameters(), *scalarizer.parameters()]]
    return [torch.cat([t.flatten() for t in tensors]) for tensors in (found, expected)]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_scalarizers_of_global_losses_are_exact(name: str) -> None:
    for found, expected in run_ranks(_scalarized_gradient, len(COUNTS), name):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
