"""Files of JSON lines that survive what happens to files, and TensorBoard."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from jddist.monitoring import JsonLines, Recorder, Run, TensorBoard
from jddist.monitoring.sinks import FILE_NAME

from ._runs import train_on_samples, train_on_tasks


def _record(folder: Path, steps: int = 3, **options: object) -> Path:
    recorder = Recorder(folder, every=1, **options)  # type: ignore[arg-type]
    train_on_tasks(recorder, steps)
    recorder.close()
    return folder / FILE_NAME


def test_every_line_is_json(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in _record(tmp_path).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["session", *["step"] * 3, "end"]
    assert lines[0]["version"] == 1 and lines[0]["method"] == "UPGradWeighting"
    assert all(len(step["groups"][0]["cosines"]) == 4 * 3 // 2 for step in lines[1:4])


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_a_line_that_was_cut_off(cut: int, tmp_path: Path) -> None:
    """A process was killed while it wrote: the next one goes on in a line of its own."""
    path = _record(tmp_path)
    content = path.read_bytes().removesuffix(path.read_bytes().splitlines(keepends=True)[-1])
    path.write_bytes(content[:-cut])
    left = 3 if cut == 1 else 2  # without its end, the last line is whole all the same
    assert [r.step for r in Run.read(tmp_path).records] == list(range(left))
    _record(tmp_path, 2)
    run = Run.read(tmp_path)
    assert [r.step for r in run.records] == list(range(left + 2))
    assert run.damaged == (0 if cut == 1 else 1)


def test_lines_of_other_kinds_are_left_out(tmp_path: Path) -> None:
    path = _record(tmp_path)
    with path.open("a") as file:
        file.write(
            '[]\n{"kind": "step"}\n{"kind": "step", "step": 7}\n\n{"kind": "new", "step": 1}\n'
        )
        file.write('{"kind": "session", "version": 1, "step": 9, "method": 3, "more": true}\n')
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\n")
    run = Run.read(path)
    assert len(run.records) == 3 and run.damaged == 5
    assert Recorder(tmp_path).step == 0  # nothing is read before the first step


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"kind": "session", "version": 2, "step": 0, "time": 0}\n')
    with pytest.raises(ValueError, match="Found records of version 2"):
        Run.read(tmp_path)


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the records of a run"):
        Run.read(tmp_path)
    (tmp_path / FILE_NAME).write_text("")
    assert Run.read(tmp_path).records == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    recorder = Recorder(tmp_path, every=1)
    with pytest.warns(RuntimeWarning, match="No space left on device") as seen:
        assert len(train_on_tasks(recorder, 3)) == 3
    assert len(seen) == 1
    (tmp_path / FILE_NAME).unlink()  # there is room again
    train_on_tasks(recorder, 2)
    recorder.close()
    assert [r.step for r in Run.read(tmp_path).records] == [3, 4]


def test_a_part_that_was_written_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _record(tmp_path)
    sink = JsonLines(path)
    with monkeypatch.context() as patched:
        # As on a disk that has room for a part.
        patched.setattr("jddist.monitoring.sinks.json.dumps", lambda *_, **__: '{"kind": "st')
        sink.close(0, {})
        sink._broken = True
    sink.close(9, {"steps": 1})
    run = Run.read(path)
    assert run.damaged == 1 and run.counts["steps"] == 4


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):  # the second goes back to a checkpoint
        recorder = Recorder(None, sinks=[TensorBoard(tmp_path)], every=1, names=list("abcd"))
        recorder.load_state_dict({"step": start})
        train_on_tasks(recorder, 4)
        recorder.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"weights/a", "norms/d", "conflict_rate", "update_mean_cosine", "bytes_sent"} <= tags
    assert {"share/weighting", "seconds/step", "counts/steps"} <= tags
    assert [event.step for event in events.Scalars("weights/a")] == [0, 1, 2, 3, 4, 5]
    recorder = Recorder(None, sinks=[TensorBoard(tmp_path / "samples")], every=1)
    train_on_samples(recorder, 1)
    recorder.close()
    events = EventAccumulator(str(tmp_path / "samples"))
    events.Reload()
    assert events.Tags()["histograms"] == ["cosines"]


def test_a_missing_tensorboard_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "jddist\[monitoring\]"'):
        TensorBoard(tmp_path)


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("jddist.monitoring.")]:
        if name.split(".")[2] in ("plots", "_drawing"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "jddist\[monitoring\]"'):
        importlib.import_module("jddist.monitoring.plots")
