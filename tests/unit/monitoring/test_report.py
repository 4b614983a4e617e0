"""The HTML page and the figures: of every kind of run, also of those that went wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from jddist import attach, grouping  # noqa: E402
from jddist.aggregation import Flattening, UPGrad, UPGradWeighting  # noqa: E402
from jddist.autogram import Engine  # noqa: E402
from jddist.autojac import backward, jac_to_grad_groups  # noqa: E402
from jddist.linalg import AutomaticProjector  # noqa: E402
from jddist.monitoring import Recorder, Run, plots  # noqa: E402
from jddist.monitoring.__main__ import main  # noqa: E402
from jddist.monitoring.report import as_html  # noqa: E402
from jddist.monitoring.sinks import FILE_NAME  # noqa: E402

from ._runs import batch, make_model, task_losses, train_on_samples, train_on_tasks  # noqa: E402

VOID = {"meta", "br", "image", "use", "path"}


class _Page(HTMLParser):
    """What a page consists of; raises if its elements are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value)
            if name == "aria-labelledby":
                self.references += [f"#{part}" for part in value.split()]
        if tag == "svg":
            self.svgs.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


def _check(text: str) -> _Page:
    """The page needs nothing else, and everybody can read it."""
    page = _Page(text)
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        local = reference.startswith("#") and reference[1:] in page.ids
        assert local or reference.startswith("data:image/png;base64,"), reference[:80]
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    assert all(svg["role"] == "img" and "viewbox" in svg for svg in page.svgs)
    assert not re.search(r"#0102[0-9a-f]{2}", text)  # all stand-ins became variables
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = (set(re.findall(r"--([\w-]+):", part)) for part in text.split("@media")[:2])
    assert used <= light and light <= dark
    return page


def _names(run: Run) -> set[str]:
    return {name for name, draw in plots.ALL.items() if draw(run, plots.Theme()) is not None}


COMMON = {"weights", "conflicts", "norms", "imbalance", "update_and_mean", "time_shares"}


def test_a_run_on_tasks(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, every=1, names=["<b>", "&", '"', "d"], per_layer_every=5)
    train_on_tasks(recorder, 70)
    recorder.close()
    run = Run.read(tmp_path)
    assert _names(run) == COMMON | {"cosines", "layer_cosines", "layer_conflicts"}
    text = as_html(run)
    page = _check(text)
    assert len(page.svgs) == 9 and page.tags.count("title") == 10
    assert "UPGradWeighting · 4 objectives · one process · steps 0 to 69 · every step" in text
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert "At step 0: &lt;b&gt;" in text  # what a screen reader says


def test_a_run_on_samples(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, every=2, per_layer_every=4)
    train_on_samples(recorder, 9)
    recorder.close()
    run = Run.read(tmp_path)
    assert _names(run) == COMMON | {"cosines", "layer_cosines", "layer_conflicts"}
    text = as_html(run)
    _check(text)
    assert "8 samples as objectives" in text and "one of 2 steps recorded" in text


def test_a_run_on_samples_and_tasks(tmp_path: Path) -> None:
    model = make_model()
    engine = Engine(model, batch_dim=0)
    recorder = Recorder(tmp_path, every=1)
    recorder.watch(engine)
    for step in range(3):
        engine.backward(model(batch(step)).square(), Flattening(UPGradWeighting()))
    run = Run.read(tmp_path)
    assert _names(run) == COMMON | {"cosines", "task_weights", "task_cosines", "task_norms"}
    text = as_html(run)
    _check(text)
    assert "Flattening(UPGradWeighting)" in text


@pytest.mark.parametrize("count", [2, 20])
def test_a_run_on_groups(count: int, tmp_path: Path) -> None:
    """Of many groups, some are shown."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 4), *(torch.nn.Linear(4, 4) for _ in range(count - 1))]
    model = torch.nn.Sequential(*layers).double()
    attach(model)
    groups = grouping.per_layer(model)
    aggregators = [UPGrad(projector=AutomaticProjector(norm_eps=0.0)) for _ in groups]
    recorder = Recorder(tmp_path, every=1)
    recorder.watch(*aggregators)
    for step in range(3):
        backward(task_losses(model, batch(step)))
        jac_to_grad_groups(groups, aggregators)
    run = Run.read(tmp_path)
    assert _names(run) == COMMON | {"layer_cosines", "layer_conflicts"}
    text = as_html(run)
    _check(text)
    assert f"{count} groups of parameters" in text


def test_many_tasks_and_one_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(5, 40).double()
    engine = Engine(model, batch_dim=None)
    recorder = Recorder(tmp_path, every=1, per_layer_every=1)
    recorder.watch(engine)
    engine.backward(model(batch(0)).square().mean(dim=0), UPGradWeighting())
    run = Run.read(tmp_path)
    assert run.records[0].groups[0].objectives == 40 and not run.records[0].per_sample
    _check(as_html(run))


def test_one_objective(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, every=1)
    train_on_samples(recorder, 2, size=1)
    _check(as_html(Run.read(tmp_path)))


def test_a_run_without_steps(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("")
    text = as_html(Run.read(tmp_path))
    assert not _check(text).svgs
    assert "No step is on record yet" in text


def test_a_run_of_skipped_steps_alone(tmp_path: Path) -> None:
    model = make_model()
    engine = Engine(model, batch_dim=0, nonfinite="skip")
    recorder = Recorder(tmp_path)
    recorder.watch(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            engine.backward(model(batch(0)).sum(dim=1) * torch.nan, UPGradWeighting())
    recorder.close()
    text = as_html(Run.read(tmp_path))
    _check(text)
    assert "3 steps were skipped" in text


def test_numbers_that_are_missing(tmp_path: Path) -> None:
    """Nulls wherever a number may be one, and everything that a reader should be told."""
    recorder = Recorder(tmp_path, every=1)
    train_on_tasks(recorder, 4)
    recorder.close()
    path = tmp_path / FILE_NAME
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for index, line in enumerate(lines[1:5]):
        group = line["groups"][0]
        for name in ("weights", "norms", "cosines", "update_cosines"):
            group[name] = [None if i in (0, index) else v for i, v in enumerate(group[name])]
        for name in ("conflict_rate", "imbalance", "update_mean_cosine"):
            del group[name]
        line["counts"] |= {"skipped": 1, "overflowed": 2, "below_norm_eps": 3, "fallbacks": 4}
    lines[1]["groups"][0]["objectives"] = 4
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "st')
    run = Run.read(tmp_path)
    assert np.isnan(run.records[0].groups[0].weights[0])
    text = as_html(run)
    _check(text)
    for note in (
        "4 steps were skipped",
        "8 steps overflowed",
        "At 12 calls the Gramian&#x27;s trace was below norm_eps",
        "16 problems were left to quadprog",
        "1 line of the records could not be read",
    ):
        assert note in text, note


def test_objectives_that_change_within_a_run(tmp_path: Path) -> None:
    for tasks in (4, 3):
        model = make_model()
        engine = Engine(model, batch_dim=None)
        recorder = Recorder(tmp_path, every=1)
        recorder.watch(engine)
        for step in range(2):
            engine.backward(task_losses(model, batch(step))[:tasks], UPGradWeighting())
    run = Run.read(tmp_path)
    assert [r.groups[0].objectives for r in run.alike] == [3, 3]
    text = as_html(run)
    _check(text)
    assert "the last 2 of 4 records are drawn" in text and "2 sessions" in text


def test_the_command(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", every=1)
    train_on_tasks(recorder, 2)
    recorder.close()
    command = [sys.executable, "-W", "error", "-m", "jddist.monitoring"]
    result = subprocess.run(
        [*command, "report", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "run" / "report.html")
    _check((tmp_path / "run" / "report.html").read_text())


def test_the_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(tmp_path / "run", every=1)
    train_on_tasks(recorder, 2)
    out = tmp_path / "other" / "page.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
    _check(out.read_text())
    assert main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "images")]) == 0
    images = {path.name for path in (tmp_path / "images").iterdir()}
    assert images == {f"{name}.png" for name in COMMON | {"cosines"}}
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "expected the records of a run" in capsys.readouterr().err
