"""docs/troubleshooting.md has a section for every error, and its anchors are there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from jddist import errors
from jddist._progress import STAGES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text()


def _sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_error_has_a_section_that_says_when_and_what_to_do() -> None:
    exported = {
        name
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.JddistError)
    }
    assert set(_sections()) == exported
    for name, text in _sections().items():
        if name != "JddistError":
            assert "*When*" in text and "*What to do*" in text, name


def test_every_stage_is_explained() -> None:
    for stage in STAGES:
        assert f"*{stage}*" in _sections()["StalledRankError"]


def test_links_to_sections_lead_somewhere() -> None:
    for page in ("troubleshooting.md", "checkpointing.md"):
        for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", (DOCS / page).read_text()):
            headings = re.findall(
                r"^#+ (.+)$", (DOCS / (target or page)).read_text(), flags=re.MULTILINE
            )
            anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in anchors, (page, anchor)
