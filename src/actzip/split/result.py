"""What :func:`actzip.split.plan` gives: the table, the best cut, and files of its two sides."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from actzip.accelerate.inputs import Inputs
from actzip.accelerate.promise import Promise
from actzip.errors import DataError, InputError
from actzip.files import write_text
from actzip.sparsify.judge import Judgement
from actzip.split.api import Network
from actzip.split.choose import Choice
from actzip.split.clock import Coding
from actzip.split.cut import Cut, cut_graph
from actzip.split.link import Link
from actzip.split.sides import Head, Tail

__all__ = ["Plan", "Row"]


@dataclass
class Row:
    """One way to do it: milliseconds until the answer is back, and what the outputs keep.

    Attributes:
        bits: on the wire an input, headers included; codec, width: how they came about.
        head_ms, encode_ms: on the client; link_ms: both ways; decode_ms, tail_ms: on the server.
        cut: None where nothing is cut. codings: all ways of the table.
        searched: bits are the fewest that keep the promise; judged: on inputs that chose nothing;
            kept: they keep it. None: not judged.
    """

    name: str
    bits: float
    codec: str
    width: int
    head_ms: float
    encode_ms: float
    link_ms: float
    decode_ms: float
    tail_ms: float
    cut: Cut | None = None
    codings: list[Coding] = field(default_factory=list)
    searched: bool = False
    judged: Judgement | None = None
    kept: bool | None = None

    @property
    def total_ms(self) -> float:
        """Until the answer is back."""
        return self.head_ms + self.encode_ms + self.link_ms + self.decode_ms + self.tail_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        made = {k: v for k, v in vars(self).items() if k not in ("cut", "codings", "judged")}
        made["total_ms"] = self.total_ms
        if self.cut is not None:
            made["number"], made["maps"] = self.cut.index, list(self.cut.values)
            made["shapes"] = [[str(d) for d in s] for s in self.cut.shapes]
            made["elements"] = self.cut.elements
            made["bits_per_element"] = self.bits / self.cut.elements
        made["codings"] = [asdict(c) for c in self.codings]
        made["judged"] = None if self.judged is None else self.judged.as_dict()
        return made


@dataclass
class Plan:
    """Where to cut a network, and why there.

    Attributes:
        rows: a row a cut, in order of execution. others: "send the JPEG" and "send nothing".
        best: the cut of least total that keeps the promise, None where none does; winner: the row
            of least total of all, which may be one of ``others``.
        choices: what the search found, by the cut's name.
        predicted: times are the cost model's. notes: what was left out, and why.
    """

    name: str
    network: Network
    link: Link
    slowdown: float
    promise: Promise
    rows: list[Row]
    others: list[Row]
    choices: dict[str, Choice]
    inputs: Inputs
    threads: int | None
    predicted: bool
    notes: list[str] = field(default_factory=list)
    best: Row | None = None
    winner: Row | None = None

    def decide(self) -> None:
        """Sets ``best`` and ``winner``."""
        kept = [r for r in self.rows if r.searched and r.kept]
        self.best = min(kept, key=lambda r: r.total_ms, default=None)
        every = [r for r in (self.best, *self.others) if r is not None and r.kept]
        self.winner = min(every, key=lambda r: r.total_ms)

    def verdict(self) -> str:
        """The answer in a sentence."""
        assert self.winner is not None
        best, winner = self.best, self.winner
        if best is None:
            return (
                f"no cut that was searched keeps the promise ({self.promise}); "
                f"{winner.name} takes {winner.total_ms:.1f} ms"
            )
        cut = (
            f"behind {best.name}: {best.total_ms:.1f} ms, {best.bits / 8000:.1f} kB "
            f"({best.bits / _elements(best):.2f} bits an element)"
        )
        if winner is best:
            return f"cut {cut}"
        return f"{winner.name} wins: {winner.total_ms:.1f} ms; the best cut is {cut}"

    def lines(self) -> list[str]:
        """The verdict, its proof, and the table as text."""
        out = [self.verdict()]
        if self.best is not None and self.best.judged is not None:
            out.append(f"kept on held-out inputs: {self.best.judged} (promised: {self.promise})")
        if self.predicted:
            out.append("times of layers are predicted by the cost model")
        slow = f", client {self.slowdown:g}x slower" if self.slowdown != 1 else ""
        out.append(
            f"link {self.link.bandwidth / 1e6:g} Mbit/s, {1e3 * self.link.latency:g} ms one way{slow}; "
            "milliseconds of one input until its answer is back"
        )
        return [*out, *self.notes, *_text_table([*self.rows, *self.others], self.best)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.name,
            "verdict": self.verdict(),
            "promise": str(self.promise),
            "bandwidth": self.link.bandwidth,
            "latency": self.link.latency,
            "client_slowdown": self.slowdown,
            "predicted": self.predicted,
            "notes": self.notes,
            "best": None if self.best is None else self.best.name,
            "winner": self.winner.name if self.winner else None,
            "rows": [r.to_dict() for r in self.rows],
            "others": [r.to_dict() for r in self.others],
        }

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the one-page report."""
        from actzip.split.page import render

        return write_text(path, render(self.to_dict()))

    def sides(self, name: str | None = None, *, tune: bool = True) -> tuple[Head, Tail]:
        """The two sides, compiled, of the best cut or of the searched cut called ``name``.

        Raises:
            InputError: that cut was not searched.
        """
        row = self._searched(name)
        assert row.cut is not None
        coder = self.choices[row.name].coder
        parts = self.network.compiled(row.cut, example=self._example(), threads=self.threads, tune=tune)
        return Head(parts.head, coder, row.name), Tail(parts.tail, coder, row.name)

    def _searched(self, name: str | None) -> Row:
        known = [r for r in self.rows if r.name in self.choices]
        rows = [self.best] if name is None else [r for r in known if r.name == name]
        row = rows[0] if rows and rows[0] is not None else None
        if row is None and name is None and known:
            row = min(known, key=lambda r: r.total_ms)
        if row is None:
            raise InputError(f"{name!r} was not searched; {', '.join(self.choices)} were")
        return row

    def _example(self) -> Tensor:
        return self.inputs.calibrate[0][: getattr(self.network.model, "batch", None) or 1]

    def save(self, folder: str | os.PathLike[str], name: str | None = None, *, onnx: bool = True) -> Path:
        """Writes ``head.actzip``, ``tail.actzip``, ``head.onnx``, ``tail.onnx`` and ``split.json``
        into a new folder, whole or not at all.

        Raises:
            DataError: the folder exists and is not empty, or cannot be written.
        """
        target = Path(folder)
        free_folder(target)
        head, tail = self.sides(name)
        try:
            made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.resolve().parent))
        except OSError as error:
            raise DataError(f"cannot write {target}: {error.strerror}") from error
        try:
            made.chmod(0o755)
            head.save(made / "head.actzip")
            tail.save(made / "tail.actzip")
            row = self._searched(name)
            if onnx and row.cut is not None:
                write_onnx(self.network, row.cut, made, self._example())
            write_text(made / "split.json", json.dumps({**self.to_dict(), "at": row.name}, indent=2) + "\n")
            os.replace(made, target)
        except OSError as error:
            raise DataError(f"cannot write {target}: {error.strerror}") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return target


def free_folder(folder: Path) -> None:
    """
    Raises:
        DataError: it exists, and not as an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists; give a folder that does not")


def write_onnx(network: Network, cut: Cut, folder: Path, example: Tensor) -> None:
    """``head.onnx`` and ``tail.onnx`` of a cut."""
    from actzip.runtime.models import GraphNet
    from actzip.runtime.onnx_export import export_onnx

    head, tail = (GraphNet(part) for part in cut_graph(network.graph, cut.values))
    maps = head(example)
    names = [f"map{i}" for i in range(len(cut.values))]
    given = maps if isinstance(maps, tuple) else (maps,)
    dynamic = getattr(network.model, "batch", None) is None
    export_onnx(head, example, folder / "head.onnx", dynamic_batch=dynamic, output_names=names)
    export_onnx(tail, given, folder / "tail.onnx", dynamic_batch=dynamic, input_names=names)


def _elements(row: Row) -> int:
    return row.cut.elements if row.cut is not None else 1


def _text_table(rows: list[Row], best: Row | None) -> list[str]:
    times = ("head", "encode", "link", "decode", "tail", "total")
    head = ("#", "cut behind", "maps", "kB", "coded", *times, "keeps")
    body = []
    for r in rows:
        number = "" if r.cut is None else str(r.cut.index)
        maps = "" if r.cut is None else str(len(r.cut.values))
        coded = f"{r.codec} {r.width} bits" if r.cut is not None else r.codec
        keeps = "" if r.judged is None else f"{r.judged.value:.4g}" + ("" if r.kept else " (not kept)")
        each = (r.head_ms, r.encode_ms, r.link_ms, r.decode_ms, r.tail_ms, r.total_ms)
        mark = " <- best" if r is best else ""
        body.append(
            (number, r.name, maps, f"{r.bits / 8000:.1f}", coded, *(f"{t:.2f}" for t in each), keeps + mark)
        )
    widths = [max(len(x[i]) for x in (head, *body)) for i in range(len(head))]
    left = {1, 4, 11}
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(x, widths))).rstrip()
        for x in (head, *body)
    ]
