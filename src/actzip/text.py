"""Text from files and users as it may be shown: no control characters, no markup."""

from __future__ import annotations

import io
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Rendered", "cell", "counted", "visible"]

# Characters that change how a terminal shows others: controls, directions of writing, separators of lines,
# halves of a pair that no encoding has.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def counted(number: int, what: str) -> str:
    """``number`` things.

    >>> counted(1, "thread"), counted(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def visible(value: object, keep: str = "") -> str:
    """``str(value)`` with what a terminal would obey, not show, as escapes; ``keep`` stays as it is.

    >>> visible("relu\\x1b[31m")
    'relu\\\\x1b[31m'
    """
    text = str(value)
    if text.isprintable() and text.isascii():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _HIDDEN else _escape(c) for c in text)


def _escape(c: str) -> str:
    return c.encode("unicode_escape", "surrogatepass").decode("ascii")


def cell(value: object, style: str = "") -> Text:
    """``value`` for a Rich table: no markup, no control characters."""
    from rich.text import Text

    return Text(visible(value), style)


class Rendered:
    """What Rich shows, and ``print`` too."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from self.parts

    def __str__(self) -> str:
        from rich.console import Console

        file = io.StringIO()
        Console(width=160, file=file, color_system=None, force_jupyter=False).print(self)
        return file.getvalue()

    __repr__ = __str__
