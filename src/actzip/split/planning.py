"""``actzip.split.plan``: every cut with its bits and its times, and the best one proven."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actzip.accelerate.inputs import Inputs, gather, open_model
from actzip.accelerate.promise import Metric, Promise
from actzip.checks import flag, number, one_of, whole
from actzip.codec import codecs as known_codecs
from actzip.data.form import Form
from actzip.errors import InputError
from actzip.profile.cost import CostModel
from actzip.runtime.interpret import interpret
from actzip.split.api import Network, open_network
from actzip.split.choose import Choice, choose
from actzip.split.clock import Coding, Timed, code_time, map_codings, time_layers
from actzip.split.cut import Cut, find_cut
from actzip.split.link import Link
from actzip.split.pictures import pictures
from actzip.split.result import Plan, Row
from actzip.split.sides import as_arrays
from actzip.training.batches import output_tensors

__all__ = ["plan"]

Step = Callable[[str, int, int], None]
_Pictured = tuple[Sequence[float], Sequence[float], Form]  # mean and deviation of pictures, their order
_CODED = 2  # inputs whose maps are coded for the table
CODECS = ("rans", "seg", "zvc")


@dataclass(frozen=True)
class _Options:
    link: Link
    slowdown: float
    bits: tuple[int, ...]
    codecs: tuple[str, ...]
    most_bits: int
    per: str
    finalists: int
    attempts: int
    threads: int | None
    predict: bool
    tune: bool


def plan(
    model: Any,
    data: Iterable[Any] | str | None,
    *,
    bandwidth: Any,
    latency: Any = 0.0,
    client_slowdown: float = 1.0,
    at: int | str | None = None,
    keep: float | None = None,
    max_error: float | None = None,
    labels: bool = False,
    metric: Metric | None = None,
    bits: Sequence[int] = (8, 4, 2),
    codecs: Sequence[str] = CODECS,
    most_bits: int = 8,
    per: str = "channel",
    finalists: int = 3,
    attempts: int = 7,
    calibrate: int = 32,
    images: int = 160,
    threads: int | None = None,
    predict: bool = False,
    tune: bool = True,
    weights: str | None = None,
    size: int | None = None,
    batch: int = 16,
    trust: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    form: Form | None = None,
    on_step: Step | None = None,
) -> Plan:
    """Where to cut a network between two machines: every cut's bits, times and total, and the best
    with its loss on inputs that chose nothing.

    Every cut is coded plainly at each of ``bits`` by each of ``codecs``; for the ``finalists`` of
    least total the fewest bits that keep the promise are searched, and proven. Beside them: sending
    the picture as JPEG, and sending nothing.

    Args:
        model, data: as of :func:`actzip.accelerate`.
        bandwidth: of the link, each way: ``"20Mbit"``, ``"2.5MB/s"``, or bits a second.
        latency: of a message, one way: ``"10ms"``, or seconds.
        client_slowdown: how many times slower than this machine the client is.
        at: only this cut: a layer's name or a cut's number.
        keep, max_error, labels, metric: the promise, as of :func:`actzip.accelerate`.
        bits, codecs: of the table. most_bits, per: of the search: greatest width of an integer, a
            step a ``channel`` or one a ``map``.
        finalists, attempts: cuts that are searched; prices of a bit that are tried for each.
        calibrate, images, batch, size, weights, trust: as of :func:`actzip.accelerate`.
        threads: of each side. predict: times by the cost model instead of measured. tune: kernels
            are timed.
        mean, std: how pictures are normalised; known for names and files.
        form: as of :func:`actzip.accelerate`; its normalisation goes before the usual one.
        on_step: called with (what, steps done, steps in all).

    Raises:
        InputError: a link of no bandwidth, an impossible promise or option, a model with several
            inputs. LayerError: an unknown layer. DataError: too few inputs.
    """
    link = Link.of(bandwidth, latency)
    slow = number(client_slowdown, "client_slowdown", 1e-6, 1e6)
    promise = Promise(0.99 if keep is None and max_error is None else keep, max_error, labels, metric)
    promise.check()
    widths = tuple(sorted({whole(b, "bits", 1, 8) for b in bits}, reverse=True))
    names = tuple(one_of(c, "codec", [k.name for k in known_codecs().values() if k.integers]) for c in codecs)
    if not widths or not names:
        raise InputError("give at least one width in bits and one codec")
    counts = {"finalists": finalists, "attempts": attempts, "images": images, "batch": batch}
    for name, value in counts.items():
        whole(value, name, 1)
    whole(most_bits, "most_bits", 1, 8)
    one_of(per, "per", ("channel", "map"))
    flag(predict, "predict")
    flag(tune, "tune")
    options = _Options(link, slow, widths, names, most_bits, per, finalists, attempts, threads, predict, tune)
    if not isinstance(model, (nn.Module, str, os.PathLike)):
        raise InputError("model must be a torch.nn.Module, a name or a path")
    step = on_step or (lambda what, done, of: None)
    step("loading", 0, 1)
    module, batches, title = open_model(
        model, data, weights=weights, size=size, images=images, batch=batch, trust=trust, form=form
    )
    form = form or Form()
    batch = getattr(module, "batch", None) or batch
    inputs = gather(batches, calibrate=calibrate, images=images, batch=batch)
    network = open_network(module, inputs.calibrate[0])
    if mean is None or std is None:
        mean, std = _normalisation(model, network, form)
    return _Planner(network, inputs, promise, options, step).result(title, at, (mean, std, form))


def _normalisation(model: Any, network: Network, form: Form) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of pictures as data sets are normalised for this model; none where that is
    not known: for modules and arrays without more."""
    from actzip.models import model_info

    channels = int(form.channels_first(network.example).shape[1])
    usual: Any = (None, None)
    if not isinstance(model, nn.Module):
        file = os.fspath(model).endswith((".onnx", ".pt2"))
        info = model_info("resnet18" if file else os.fspath(model))
        usual = info.mean, info.std
        if len(info.mean) != channels:
            usual = (0.0,) * channels, (1.0,) * channels
    if not form.normalises and (form.arrays or isinstance(model, nn.Module)):
        return (), ()
    mean, std = form.normalisation(channels, *usual)
    return mean or (), std or ()


class _Planner:
    def __init__(
        self, network: Network, inputs: Inputs, promise: Promise, options: _Options, step: Step
    ) -> None:
        self.network, self.inputs, self.promise, self.o, self.step = network, inputs, promise, options, step
        self.fixed = getattr(network.model, "batch", None) or 1
        self.notes: list[str] = []

    def result(self, title: str, at: int | str | None, pictured: _Pictured) -> Plan:
        cuts = self.network.cuts()
        only = None if at is None else find_cut(self.network.graph, at, self.network.layers)
        if only is not None:
            cuts = [next((c for c in cuts if c.values == only.values), only)]
        if not cuts:
            raise InputError("the network has no place to cut")
        self.step("timing layers", 0, 1)
        times = self._times()
        with torch.no_grad():
            outputs = output_tensors(self.network.model(self.network.example[:1]))
        self.answer_bits = sum(32.0 * t.numel() for t in outputs)
        rows = self._rows(cuts, times)
        choices = self._choices(rows)
        found = Plan(
            title,
            self.network,
            self.o.link,
            self.o.slowdown,
            self.promise,
            rows,
            self._others(times, pictured),
            choices,
            self.inputs,
            self.o.threads,
            times.predicted,
            self.notes,
        )
        found.decide()
        return found

    def _times(self) -> Timed:
        cost = None
        if self.o.predict:
            from actzip import cpu

            threads = self.o.threads or int(cpu.info()["threads"])
            cost = CostModel.of_this_machine(
                threads, on_step=lambda done, of: self.step("timing this machine, once", done, of)
            )
        x = self.inputs.calibrate[0][: self.fixed]
        return time_layers(self.network.graph, x, threads=self.o.threads, cost=cost, tune=self.o.tune)

    def _rows(self, cuts: Sequence[Cut], times: Timed) -> list[Row]:
        """The table: each map is coded once, whichever cuts it crosses."""
        values = list(dict.fromkeys(v for c in cuts for v in c.values))
        graph = self.network.graph
        x = self.inputs.calibrate[0][: _CODED if self.fixed == 1 else self.fixed]
        maps = interpret(graph, {graph.inputs[0]: x}, values)[1]
        coded: dict[str, list[Coding]] = {}
        for i, v in enumerate(values):
            self.step("coding maps", i, len(values))
            coded[v] = map_codings(v, maps.pop(v).numpy(), self.o.codecs, self.o.bits)
        return [self._row(c, [coded[v] for v in c.values], times) for c in cuts]

    def _row(self, cut: Cut, coded: Sequence[Sequence[Coding]], times: Timed) -> Row:
        head = times.head(cut.values)
        codings = [
            Coding(
                ways[0].codec,
                ways[0].bits,
                sum(w.size for w in ways),
                sum(w.encode_ms for w in ways),
                sum(w.decode_ms for w in ways),
            )
            for ways in zip(*coded, strict=True)
        ]
        rows = [self._total(cut.name, head, times.total - head, c) for c in codings]
        best = min(rows, key=lambda r: r.total_ms)
        best.cut, best.codings = cut, codings
        return best

    def _total(self, name: str, head: float, tail: float, c: Coding) -> Row:
        slow, link = self.o.slowdown, self.o.link
        return Row(
            name,
            c.size,
            c.codec,
            c.bits,
            head * slow,
            c.encode_ms * slow,
            link.ms(c.size, self.answer_bits),
            c.decode_ms,
            tail,
        )

    def _choices(self, rows: list[Row]) -> dict[str, Choice]:
        """The search at the cuts of least total, whose rows are replaced by what it found."""
        chosen: dict[str, Choice] = {}
        order = sorted(range(len(rows)), key=lambda i: rows[i].total_ms)[: self.o.finalists]
        total = len(order) * self.o.attempts
        for k, i in enumerate(order):
            done, name = k * self.o.attempts, rows[i].name

            def tick(tried: int, of: int, done: int = done, name: str = name) -> None:
                self.step(f"fewest bits behind {name}", done + tried, total)

            tick(0, 0)
            rows[i], chosen[name] = self._searched(rows[i], tick)
        return chosen

    def _searched(self, row: Row, tick: Callable[[int, int], None]) -> tuple[Row, Choice]:
        assert row.cut is not None
        head, tail = self.network.parts(row.cut)
        choice = choose(
            head,
            tail,
            self.inputs,
            self.promise,
            row.cut.values,
            bits=self.o.most_bits,
            per=self.o.per,
            attempts=self.o.attempts,
            on_step=tick,
        )
        with torch.no_grad():
            one = as_arrays(head(self.inputs.calibrate[0][: self.fixed]))
        times = code_time(choice.coder, one)
        width = max(q.bits for q in choice.coder.quantizers)
        way = Coding(choice.coder.codec, width, choice.bits, *times)
        made = self._total(row.name, row.head_ms / self.o.slowdown, row.tail_ms, way)
        made.cut, made.codings, made.searched = row.cut, row.codings, True
        made.judged, made.kept = choice.judged["promised"], choice.met
        return made, choice

    def _others(self, times: Timed, pictured: _Pictured) -> list[Row]:
        """Sending the picture, and sending nothing."""
        nothing = Row("send nothing", 0, "", 0, times.total * self.o.slowdown, 0, 0, 0, 0, kept=True)
        self.step("pictures", 0, 1)
        found, why = (
            pictures(self.network.model, self.inputs.prove, self.promise, *pictured)
            if len(pictured[0])
            else (None, "how pictures are normalised is not known: give mean and std")
        )
        if found is None:
            self.notes.append(f"send the JPEG: left out, {why}")
            return [nothing]
        way = Coding(f"JPEG {found.quality}", 8, found.bits, found.encode_ms, found.decode_ms)
        jpeg = self._total("send the JPEG", 0.0, times.total, way)
        jpeg.judged, jpeg.kept, jpeg.searched = found.judged, found.kept, True
        return [jpeg, nothing]
