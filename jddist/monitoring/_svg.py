"""Figures as SVG that lives inside an HTML page and takes the page's colours."""

from __future__ import annotations

import io
import re
from dataclasses import fields
from html import escape
from xml.etree import ElementTree

from ._drawing import Figure, Theme, matplotlib

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

# Colours that nothing else has, each of which stands for a variable of the page.
_VARIABLES = ("ink", "muted", "grid", "s1", "s2", "s3", "s4", "s5", "s6")
_STAND_INS = {name: f"#0102{index:02x}" for index, name in enumerate(_VARIABLES)}

PAGE_THEME = Theme(
    ink=_STAND_INS["ink"],
    muted=_STAND_INS["muted"],
    grid=_STAND_INS["grid"],
    series=tuple(_STAND_INS[f"s{i}"] for i in range(1, 7)),
)
assert {f.name for f in fields(Theme)} >= {"ink", "muted", "grid", "series"}


def inline_svg(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: Drawn with ``PAGE_THEME``.
        key: What makes its ids unique on the page.
        title: The name that a screen reader says.
        description: What it says then.
    """
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None}, dpi=144)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(content.getvalue())
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata":
            root.remove(child)
    _keep_needed_ids(root, key)
    width, height = (root.attrib.pop(name).removesuffix("pt") for name in ("width", "height"))
    root.set("viewBox", f"0 0 {width} {height}")
    text = ElementTree.tostring(root, encoding="unicode")
    for name, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    start, rest = text.split(">", 1)
    label = f'role="img" aria-labelledby="{key}-title {key}-text"'
    described = (
        f'<title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-text">{escape(description)}</desc>'
    )
    return f"{start} {label}>{described}{rest}"


def _keep_needed_ids(root: ElementTree.Element, key: str) -> None:
    """Drops ids that nothing refers to, and makes the others unique on the page."""
    refers = re.compile(r"#([\w.-]+)")
    used: set[str] = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == f"{{{_XLINK}}}href" or "url(#" in value:
                used.update(refers.findall(value) if not value.startswith("data:") else ())
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{key}-{own}")
        for name, value in list(element.attrib.items()):
            if name == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(name, f"#{key}-{value[1:]}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{key}-"))
