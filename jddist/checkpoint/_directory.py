"""The directory of checkpoints: what is complete, what is intact, and what may go.

A checkpoint is written to a directory with a hidden name, and gets its own name by one rename when
all of its files are on the disk. Whatever the moment of a kill, every directory with a proper name
is complete. A manifest holds the size and the digest of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
POINTER = "latest"
_NAME = re.compile(r"(\d{6,})-step-(-?\d+)")
_PARTIAL, _REMOVED = ".partial-", ".removed-"
_CHUNK = 1 << 22


class Directory:
    """A directory of checkpoints. One rank at a time may change it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The complete checkpoints, the newest first."""
        if not self.path.is_dir():
            return []
        found = [e.name for e in self.path.iterdir() if _NAME.fullmatch(e.name) and e.is_dir()]
        return sorted(found, key=_serial, reverse=True)

    def begin(self, step: int) -> tuple[str, Path]:
        """The name of a new checkpoint, and an empty directory to write it to."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in [*self.path.glob(f"{_PARTIAL}*"), *self.path.glob(f"{_REMOVED}*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        # Numbered in the order of writing: a run that went back may write the same step twice.
        serial = max((_serial(name) for name in self.names()), default=0) + 1
        name = f"{serial:06d}-step-{step}"
        partial = self.partial(name)
        partial.mkdir()
        return name, partial

    def partial(self, name: str) -> Path:
        """Where a checkpoint is until it is complete."""
        return self.path / f"{_PARTIAL}{name}"

    def finish(self, name: str, manifest: Mapping[str, Any]) -> None:
        """Makes a checkpoint count, whose files are on the disk already."""
        partial = self.partial(name)
        content = {**manifest, "digest": _digest_of(manifest)}
        write(partial / MANIFEST, json.dumps(content, indent=1, sort_keys=True).encode())
        sync_directory(partial)
        os.rename(partial, self.path / name)

    def point_to(self, name: str) -> None:
        """Writes down which checkpoint is the newest, for people and scripts."""
        sync_directory(self.path)
        pointer = self.path / f".{POINTER}"
        write(pointer, f"{name}\n".encode())
        os.replace(pointer, self.path / POINTER)
        sync_directory(self.path)

    def abandon(self, name: str) -> None:
        """Frees the room of a checkpoint that could not be finished."""
        shutil.rmtree(self.partial(name), ignore_errors=True)

    def prune(self, keep: int, corrupt: Iterable[str]) -> None:
        """Removes those known to be corrupt, and all others but the newest ``keep``."""
        corrupt = set(corrupt)
        names = self.names()
        intact = [name for name in names if name not in corrupt]
        for name in [*(n for n in names if n in corrupt), *intact[keep:]]:
            removed = self.path / f"{_REMOVED}{name}"
            os.rename(self.path / name, removed)  # never half a checkpoint under a proper name
            shutil.rmtree(removed, ignore_errors=True)

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a checkpoint.

        Raises:
            ValueError: It is damaged.
            OSError: It cannot be read.
        """
        content = json.loads((self.path / name / MANIFEST).read_bytes())
        if not isinstance(content, dict) or content.pop("digest", None) != _digest_of(content):
            raise ValueError(f"{MANIFEST} is damaged")
        return content

    def check(self, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ValueError or OSError unless the files are what the manifest says."""
        for file, expected in files.items():
            path = self.path / name / file
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise ValueError(f"{file} has {size} bytes instead of {expected['bytes']}")
            if fingerprint(path)["blake2b"] != expected["blake2b"]:
                raise ValueError(f"{file} is not what was written (its checksum differs)")


def write(path: Path, content: bytes) -> None:
    """Writes a file, and returns when it is on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Returns when the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """The size and digest of a file."""
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _serial(name: str) -> int:
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1])


def _digest_of(manifest: Mapping[str, Any]) -> str:
    content = json.dumps(manifest, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
