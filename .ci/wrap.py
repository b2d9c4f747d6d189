"""Wraps the project's Markdown at 100 characters: python .ci/wrap.py [--check]

Paragraphs and list items are filled; tables, headings, comments, blocks of code and doctests stay
as they are. A piece of code between backticks is not broken.
"""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

WIDTH = 100
ITEM = re.compile(r"(\s*)([-*]|\d+\.) +")
AS_IT_IS = ("|", "#", "<!--")


def fill(words: str, first: str, rest: str) -> list[str]:
    whole = re.sub(r"`[^`]*`", lambda m: m[0].replace(" ", "\0"), " ".join(words.split()))
    whole = re.sub(
        r" (?=([-*+>#|]|\d+\.)( |$))", "\0", whole
    )  # at the start of a line these would mean something
    lines = textwrap.wrap(
        whole,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in lines]


def wrapped(text: str) -> str:
    out: list[str] = []
    paragraph: list[str] = []
    first = rest = ""
    verbatim = ""  # what ends the block that is copied: a fence, or a blank line behind a doctest

    def flush() -> None:
        if paragraph:
            out.extend(fill(" ".join(paragraph), first, rest))
            paragraph.clear()

    for line in text.split("\n"):
        item = ITEM.match(line)
        if verbatim:
            out.append(line)
            if line.strip() == verbatim.strip() or (verbatim == "```" and line.strip().startswith("```")):
                verbatim = ""
        elif line.lstrip().startswith("```") or line.startswith(">>>"):
            flush()
            out.append(line)
            verbatim = "```" if "```" in line else " "
        elif (
            not line.strip()
            or line.lstrip().startswith(AS_IT_IS)
            or (line.startswith("    ") and not paragraph)
        ):
            flush()
            out.append(line)
            first = rest = ""
        elif item:
            flush()
            first, rest = item[0], " " * len(item[0])
            paragraph.append(line[len(first) :])
        else:
            if not paragraph:
                first = rest = ""
            paragraph.append(line.strip())
    flush()
    return "\n".join(out)


def main() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], capture_output=True, text=True, check=True)
    stale = []
    for path in map(Path, listed.stdout.split()):
        text = path.read_text(encoding="utf-8")
        if (new := wrapped(text)) != text:
            stale.append(str(path))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(*stale, sep="\n")
        if "--check" in sys.argv:
            sys.exit("these pages are not wrapped: run make format")


main()
