"""Which node of a part does not compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["MOST_CUTS", "first_failing", "reasons"]

#: Nodes of a model at which parts that do not compile are cut; what fails then stays elsewhere whole.
MOST_CUTS = 8


def first_failing(count: int, fails: Callable[[int], bool]) -> int:
    """The place of the node at which ``count`` nodes in a row fail: ``fails(n)`` says whether the
    first ``n`` do, of all of them it is known, and of none they do not."""
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return bad - 1


def reasons(said: Iterable[str], most: int = 6) -> str:
    """Reasons in one line, each once."""
    found = list(dict.fromkeys(" ".join(s.split()) for s in said if s))
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more
