"""``torch.distributed.checkpoint`` as jddist uses it: tensors only, and without unpickling.

Its metadata file is a pickle. The reader here takes the few types that such a file consists of and
nothing else, so that a checkpoint of unknown origin cannot run code.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from jddist.errors import CheckpointError

_METADATA_TYPES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


def save(tensors: dict[str, Tensor], path: Path, group: dist.ProcessGroup | None) -> None:
    """Writes tensors, sharded ones by the ranks that hold them, and returns when they are on disk.

    Args:
        tensors: By name; those that are no DTensors are taken for the same on every rank.
        path: An empty directory that all ranks see.
        group: The ranks, which all have to call; None for this process alone.

    Raises:
        CheckpointError: What went wrong on which rank. The same on all.
    """
    writer = _Writer(path, sync_files=True)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with _naming_ranks(group):
        if group is not None:
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
            return
        # dcp.save would warn that nothing is distributed.
        planner.set_up_planner(tensors, writer.storage_meta(), True)
        writer.set_up_storage_writer(True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plans, metadata = planner.create_global_plan([plan])
        (plan,) = writer.prepare_global_plan(plans)
        written = writer.write_data(planner.finish_plan(plan), planner)
        writer.finish(metadata, [written.wait()])


def load(tensors: dict[str, Tensor], path: Path, group: dist.ProcessGroup | None) -> None:
    """Reads tensors in place, each rank its shards. The counterpart of ``save``."""
    reader = _Reader(path)
    planner = _Planner(flatten_state_dict=False)
    with _naming_ranks(group):
        if group is not None:
            dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group)
            return
        metadata = reader.read_metadata()
        planner.set_up_planner(tensors, metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()


@contextmanager
def _naming_ranks(group: dist.ProcessGroup | None) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # no subclass of Exception
        listed = "; ".join(
            f"rank {rank}: {type(cause).__name__}: {cause}"
            for rank, (cause, _) in sorted(error.failures.items())
        )
        raise CheckpointError(listed) from error
    except Exception as error:
        if group is not None:  # a rank that died: no story about files
            raise
        raise CheckpointError(f"rank 0: {type(error).__name__}: {error}") from error


class _Writer(FileSystemWriter):
    """A writer that says why it could not write."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # torch.save goes on to fail in another way, and that alone would be heard of.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


class _Reader(FileSystemReader):
    """A reader that does not trust the metadata file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"Found a {type(metadata).__name__} in .metadata; expected Metadata.")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _METADATA_TYPES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"Found {module}.{name} in the metadata of a checkpoint; expected the types of "
            "torch.distributed.checkpoint only. Do not load this checkpoint: it is no data."
        )


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"Found '{read_item.dest_index.fqn}', which is no tensor.")
