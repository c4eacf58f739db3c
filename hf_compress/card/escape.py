"""Text from outside inside Markdown: it stays text, whatever it holds."""

from __future__ import annotations

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def text(value: object) -> str:
    """One line of plain text: no HTML, no table bars, no links, no line breaks."""
    return re.sub(r"([\\`*\[\]<>|#~&!]|(?<!\w)_|_(?!\w))", lambda m: f"&#{ord(m[1])};", one_line(value))


def cell(value: str) -> str:
    """Text of a table's cell; an interval and a unit stay on one line with what they belong to."""
    held = re.sub(r"\(.*?\)", lambda m: m[0].replace(" ", "\u00a0"), text(value))
    return re.sub(r"(?<=\d) (MB|MiB|M|ms)$", "\u00a0\\1", held)


def code(value: object) -> str:
    """An inline code span, whatever backticks are inside."""
    line = one_line(value)
    fence = "`" * (longest_run(line) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def hub_link(value: str, kind: str = "") -> str:
    """A link to the Hub where `value` is an id of it (`kind`: "datasets/" or none, for models); else inline code."""
    return f"[{value}](https://huggingface.co/{kind}{value})" if HUB_ID.fullmatch(value) else code(value)


def fence_for(block: str) -> str:
    """A fence that nothing inside `block` closes."""
    return "`" * max(3, longest_run(block) + 1)


def one_line(value: object) -> str:
    """Without line breaks, and without what begins an HTML comment: the card's own marks are comments."""
    return " ".join(str(value).split()).replace("<!--", "<! --")


def longest_run(value: str) -> int:
    return max(map(len, re.findall("`+", value)), default=0)
