"""Texts of users, fit to be shown: what cannot be seen, or moves other text, is spelled out."""

from __future__ import annotations

import re

_PICTURES = 0x2400  # of the control characters from 0: U+2400 is the picture of U+0000
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
    "|[\ud800-\udfff\ufff9-\uffff]"
)


def plain(text: str) -> str:
    """Return ``text`` with control characters and marks of direction written out.

    Such characters could hide a part of a name or turn what follows around. Tabs and line feeds
    stay as they are.
    """
    return _HIDDEN.sub(lambda found: _written(found[0]), text)


def short(text: str, longest: int = 22) -> str:
    """Return a text for a tick of a figure: in one line, and its beginning if it is too long."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _written(character: str) -> str:
    code = ord(character)
    return chr(_PICTURES + code) if code < 0x20 else f"\\u{code:04x}"
