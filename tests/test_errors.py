"""What errors look like, whatever others put into them."""

from __future__ import annotations

import pytest

from fledge_tasks.errors import FledgeError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("größer, 大きい", "größer, 大きい"),
        ("\x1b[31mred\r\x00", r"\x1b[31mred\r\x00"),
        ("file \udcff", r"file \udcff"),
        ("left \u202e right", r"left \u202e right"),
    ],
)
def test_no_control_characters(message: str, shown: str) -> None:
    assert str(FledgeError(message, where="\x07", hint=message)) == rf"\x07: {shown}" + "\n  hint: " + shown.replace(
        "\n", "\n  "
    )


def test_long_lines_lose_their_middle() -> None:
    text = str(FledgeError("found " + "x" * 10_000 + ", expected y\nnext line"))
    assert len(text) < 4100
    assert text.startswith("found xxx") and "xxx...xxx" in text
    assert text.endswith("xxx, expected y\nnext line")
