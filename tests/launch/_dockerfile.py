"""Reads Dockerfiles, and carries out their steps without Docker.

Each stage gets the machine's own files as an overlay that takes all writes (so the machine stays as
it is), and every RUN is run there by a shell, as the user and with the environment and directory of
the Dockerfile. As a program it needs a mount namespace of its own:

    unshare --mount --propagation private python -m tests.launch._dockerfile SPECIFICATION

where SPECIFICATION is JSON: dockerfile, context, arguments, replaced ({pattern: text} in RUN),
folder, environment, finally (commands, run as the image's user) and finally_environment.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

_HOST_FOLDERS = ("proc", "sys", "dev")


@dataclass(frozen=True)
class Instruction:
    """A line of a Dockerfile, with its continuations joined."""

    name: str
    text: str


@dataclass
class Stage:
    """A FROM and what follows it."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class State:
    """What the instructions before set for those that follow."""

    root: Path
    folder: str = "/"
    user: str = "0"
    variables: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)


def instructions_of(text: str) -> list[Instruction]:
    """All instructions in order, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: list[Instruction] = []
    for block in re.split(r"(?<!\\)\n", "\n".join(lines)):
        words = block.strip().split(None, 1)
        if words:
            rest = re.sub(r"\\\n\s*", " ", words[1]) if len(words) > 1 else ""
            found.append(Instruction(words[0].upper(), rest.strip()))
    return found


def stages_of(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their defaults, and the stages."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in instructions_of(text):
        if instruction.name == "FROM":
            base, *rest = instruction.text.split()
            stages.append(Stage(base, rest[1] if rest else str(len(stages))))
        elif not stages:
            assert instruction.name == "ARG", instruction
            name, _, default = instruction.text.partition("=")
            arguments[name] = default
        else:
            stages[-1].instructions.append(instruction)
    return arguments, stages


def let_in(ignore_file: str, path: str) -> bool:
    """Whether a .dockerignore lets a path of the context through: the last match decides."""
    ignored = False
    parts = path.split("/")
    prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for line in ignore_file.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep = pattern.startswith("!")
        pattern = pattern.removeprefix("!").strip("/")
        anywhere = pattern.removeprefix("**/")
        for prefix in prefixes:
            name = prefix.split("/")[-1] if anywhere != pattern else prefix
            if fnmatch.fnmatchcase(name, anywhere) and name.count("/") == anywhere.count("/"):
                ignored = not keep
    return not ignored


def substitute(text: str, variables: dict[str, str]) -> str:
    """Replaces $NAME and ${NAME}, as Docker does outside of RUN."""
    return re.sub(
        r"\$(?:\{(\w+)\}|(\w+))", lambda m: variables.get(m.group(1) or m.group(2), ""), text
    )


def assignments(text: str) -> dict[str, str]:
    """``A=b C="d e"`` as a dict."""
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|[^\s"]+)', text)}


class Builder:
    """Carries out the instructions of stages."""

    def __init__(self, specification: dict) -> None:
        self._context = Path(specification["context"])
        self._ignore = (self._context / ".dockerignore").read_text()
        self._given: dict[str, str] = specification["arguments"]
        self._replaced: dict[str, str] = specification["replaced"]
        self._folder = Path(specification["folder"])
        self._environment: dict[str, str] = specification["environment"]
        self._roots: dict[str, Path] = {}

    def build(self, stage: Stage) -> State:
        """Runs all instructions of a stage."""
        state = State(self._new_root(stage.name))
        state.variables["PATH"] = self._environment["PATH"]
        for instruction in stage.instructions:
            print(f"[{stage.name}] {instruction.name} {instruction.text}", flush=True)
            getattr(self, f"_{instruction.name.lower()}")(state, instruction.text)
        self._roots[stage.name] = state.root
        return state

    def run(self, state: State, shell: str, added: dict[str, str] | None = None) -> None:
        """Runs a command as the stage's user, in its folder and with its environment."""
        program = ["chroot", f"--userspec={state.user}:{state.user}", str(state.root)]
        program += ["/bin/sh", "-ec", f"cd {state.folder}; {shell}"]
        environment = {**self._environment, **state.arguments, **state.variables}
        if added:
            environment |= added
        environment["HOME"] = "/root" if state.user == "0" else "/tmp"
        result = subprocess.run(program, env=environment)
        if result.returncode != 0:
            sys.exit(f"step failed with exit code {result.returncode}: {shell}")

    def _new_root(self, name: str) -> Path:
        home = self._folder / name
        for part in ("upper", "work", "root"):
            (home / part).mkdir(parents=True)
        root = home / "root"
        options = f"lowerdir=/,upperdir={home}/upper,workdir={home}/work"
        _call("mount", "-t", "overlay", "overlay", "-o", options, str(root))
        for part in _HOST_FOLDERS:
            _call("mount", "--rbind", f"/{part}", str(root / part))
        # An image has none of what this machine has in /tmp, /src, ...; Python may lie in /root,
        # where the image's user could not look.
        for program in (Path("/root"), *_above(Path(sys.base_prefix))):
            inside = root / str(program).lstrip("/")
            if inside.exists():
                inside.chmod(inside.stat().st_mode | 0o055)
        return root

    def _arg(self, state: State, text: str) -> None:
        name, _, default = text.partition("=")
        state.arguments[name] = self._given.get(name, default)

    def _env(self, state: State, text: str) -> None:
        values = assignments(substitute(text, {**state.arguments, **state.variables}))
        assert values, text
        state.variables |= values

    def _workdir(self, state: State, text: str) -> None:
        state.folder = text
        _inside(state.root, text).mkdir(parents=True, exist_ok=True)

    def _user(self, state: State, text: str) -> None:
        state.user = text

    def _run(self, state: State, text: str) -> None:
        shell = re.sub(r"^(--\w+=\S+\s+)+", "", text)
        for pattern, other in self._replaced.items():
            shell = re.sub(pattern, other, shell)
        self.run(state, shell)

    def _copy(self, state: State, text: str) -> None:
        *words, target = text.split()
        options = dict(w.removeprefix("--").split("=") for w in words if w.startswith("--"))
        sources = [w for w in words if not w.startswith("--")]
        base = self._roots[options["from"]] if "from" in options else self._context
        destination = _inside(state.root, os.path.join(state.folder, target))
        several = target.endswith("/") or len(sources) > 1
        for source in sources:
            origin = _inside(base, source)
            if "from" not in options and not let_in(self._ignore, source):
                sys.exit(f"step failed: .dockerignore leaves out {source}")
            if origin.is_dir():
                left_out = None if "from" in options else self._left_out
                shutil.copytree(
                    origin, destination, symlinks=True, dirs_exist_ok=True, ignore=left_out
                )
                copied = destination
            else:
                copied = destination / origin.name if several else destination
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(origin, copied)
            if "chown" in options:
                _call("chroot", str(state.root), "chown", "-R", options["chown"],
                      "/" + str(copied.relative_to(state.root)))  # fmt: skip

    def _left_out(self, folder: str, names: list[str]) -> set[str]:
        inside = os.path.relpath(folder, self._context)
        return {name for name in names if not let_in(self._ignore, f"{inside}/{name}")}

    def _healthcheck(self, state: State, text: str) -> None:
        assert re.search(r"CMD \[", text), text

    def _cmd(self, state: State, text: str) -> None:
        json.loads(text)


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _above(path: Path) -> list[Path]:
    return [p for p in (path, *path.parents) if p.is_relative_to("/root")]


def _call(*words: str) -> None:
    subprocess.run(words, check=True)


def main() -> None:
    """Builds all stages, and runs what is asked for in the last one."""
    specification = json.loads(sys.argv[1])
    folder = Path(specification["folder"])
    # In memory: an overlay cannot write into what it lies over.
    _call("mount", "-t", "tmpfs", "tmpfs", str(folder))
    builder = Builder(specification)
    _, stages = stages_of(Path(specification["dockerfile"]).read_text())
    for stage in stages:
        state = builder.build(stage)
    for command in specification["finally"]:
        builder.run(state, command, specification["finally_environment"])


if __name__ == "__main__":
    main()
