"""The tables of README.md and docs/results, made of the figures in benchmarks/results.

    python benchmarks/tables.py            # write them into the pages
    python benchmarks/tables.py --check    # say which pages differ, with exit code 1 where one does

A table stands in its page between ``<!-- table: NAME -->`` and ``<!-- end -->``; what is around it
is written by hand. A table is a function of ``pages/`` (a module a page) whose name is NAME with
``_`` for ``-``. It returns lines of Markdown.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pages import ROOT, TABLES

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str, where: str) -> str:
    """``text`` with every table made anew."""

    def one(found: re.Match[str]) -> str:
        make = TABLES.get(found.group(2))
        if make is None:
            raise SystemExit(f"{where}: there is no table {found.group(2)!r}; there are {', '.join(TABLES)}")
        return found.group(1) + "\n" + "\n".join(make()) + "\n\n" + found.group(3)

    return BLOCK.sub(one, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text, str(path))
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(*stale, sep="\n")
    if check and stale:
        sys.exit("these pages differ from benchmarks/results: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
