"""Capture leaves no trace: what a model's Python changes while it is traced is noticed and put back.

Tracing calls ``forward`` and its hooks. :class:`State` keeps what they can reach, the model's
attributes, containers, closures, globals they name, and the states of random generators.
:func:`calls_at` runs a model without numbers and tells which operators it called, so that
what it does at one batch can be compared with another.
"""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["State", "calls_at", "changes_that_count", "draws", "same_calls", "untouched"]

_MOST = 200_000  # objects followed
_OWN = "actzip.runtime."  # whose graphs stay as they are, and whose caches may grow
#: The parameters once more, as torch.nn's recurrent layers keep them; export puts others there.
_MIRRORS = ("_flat_weights", "_flat_weight_refs")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _foreign(name: str | None) -> bool:
    """Of a library whose objects a forward pass does not write to."""
    return (name or "").partition(".")[0] in ("torch", "numpy", "builtins", "collections", "typing")


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return False


def _same_but_tensors(a: Any, b: Any) -> bool:
    """As :func:`_same`, any tensor for any other."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return True
    if type(a) is type(b) and isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same_but_tensors, a, b))
    if type(a) is type(b) and isinstance(a, dict):
        return list(a) == list(b) and all(_same_but_tensors(a[k], b[k]) for k in a)
    return _same(a, b)


class State:
    """What the forward pass of ``model`` can reach, as it is now.

    Args:
        numbers: keep the numbers of arrays and tensors that are no parameters or buffers.
        own: of these too.
    """

    def __init__(self, model: nn.Module, *, numbers: bool = True, own: bool = False) -> None:
        self.numbers = numbers
        self._own = set() if own else {id(t) for t in (*model.parameters(), *model.buffers())}
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.saved: list[tuple[Any, Any, str, Callable[[Any], Any], Callable[[Any, Any], None]]] = []
        self.random = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
        self._seen: dict[int, Any] = {}
        stack: list[tuple[Any, str]] = [(model, "")]
        while stack and len(self._seen) < _MOST:
            item, name = stack.pop()
            if isinstance(item, (*_PLAIN, types.ModuleType)) or id(item) in self._seen:
                continue
            self._seen[id(item)] = item
            stack.extend(self._visit(item, name))

    def _visit(self, item: Any, name: str) -> Iterator[tuple[Any, str]]:
        if isinstance(item, Tensor):
            if (
                self.numbers
                and id(item) not in self._own
                and item.layout is torch.strided
                and item.device.type != "meta"
            ):
                self.tensors.append((item, item.detach().clone()))
        elif isinstance(item, dict):
            self._save(item, name, dict, _put_dict)
            for k, v in list(item.items()):
                yield v, _path(name, k)
        elif isinstance(item, (list, deque)):
            self._save(item, name, list, _put_list)
            yield from ((v, name) for v in item)
        elif isinstance(item, set):
            self._save(item, name, set, _put_set)
        elif isinstance(item, (tuple, frozenset)):
            yield from ((v, name) for v in item)
        elif isinstance(item, np.ndarray):
            if self.numbers and item.flags.writeable:
                self._save(item, name, np.copy, np.copyto)
        elif isinstance(item, types.FunctionType):
            yield from self._function(item)
        elif isinstance(item, types.MethodType):
            yield from ((item.__self__, "()"), (item.__func__, "()"))
        elif isinstance(item, functools.partial):
            yield from ((v, "()") for v in (item.func, item.args, item.keywords))
        elif isinstance(item, type):
            yield from self._class(item)
        elif isinstance(item, nn.Module) or not (_foreign(kind := type(item).__module__) or _OWN in kind):
            yield type(item), "()"  # its functions, and what they name
            with suppress(TypeError):
                yield vars(item), name

    def _function(self, f: types.FunctionType) -> Iterator[tuple[Any, str]]:
        if _foreign(f.__module__) or f.__module__.startswith("actzip."):
            return
        for cell in f.__closure__ or ():
            with suppress(ValueError):  # empty
                yield cell.cell_contents, "()"
                self._save(cell, "()", lambda c: (c.cell_contents,), _put_cell)
        yield f.__defaults__, "()"
        names = [n for n in f.__code__.co_names if n in f.__globals__]
        if names:
            here = f.__globals__
            values = {n: here[n] for n in names}
            self._save(here, "()", functools.partial(_pick, names=tuple(names)), _put_names)
            yield from ((v, "()") for v in values.values())

    def _class(self, cls: type) -> Iterator[tuple[Any, str]]:
        if _foreign(cls.__module__) or cls.__module__.startswith("actzip."):
            return
        own = {k: v for k, v in vars(cls).items() if not k.startswith("__")}
        data = tuple(k for k, v in own.items() if not callable(v) and not hasattr(v, "__get__"))
        self._save(cls, "()", functools.partial(_pick_attributes, names=data), _put_attributes)
        yield from ((v, "()") for v in own.values())
        yield from ((base, "()") for base in cls.__bases__)

    def _save(
        self, item: Any, name: str, read: Callable[[Any], Any], write: Callable[[Any, Any], None]
    ) -> None:
        self.saved.append((item, read(item), name, read, write))

    def changes(self, *, tensors: bool = True) -> list[str]:
        """The model's attributes that are other ones now; without ``tensors``: but for tensors."""
        same = _same if tensors else _same_but_tensors
        found = []
        for item, was, name, read, _ in self.saved:
            if name.startswith("()") or "()" in name:
                continue
            now = read(item)
            if isinstance(was, dict):
                if list(was) != list(now) or not all(same(was[k], now[k]) for k in was):
                    keys = [k for k in {**was, **now} if not same(was.get(k, _NONE), now.get(k, _NONE))]
                    found += [f"{name}.{k}".strip(".") for k in keys]
            elif isinstance(was, list):
                if len(was) != len(now) or not all(map(same, was, now)):
                    found.append(name.strip("."))
            elif isinstance(was, set) and was != now:
                found.append(name.strip("."))
        return [n for n in found if n.rpartition(".")[2] not in _MIRRORS]

    def drew(self) -> bool:
        """Whether Python's or numpy's random numbers were drawn."""
        a, b = np.random.get_state(), self.random[1]  # noqa: NPY002
        return random.getstate() != self.random[0] or not all(
            np.array_equal(x, y) for x, y in zip(a, b, strict=True)
        )

    def restore(self) -> None:
        """Puts everything back."""
        for item, was, _, read, write in self.saved:
            now = read(item)
            if isinstance(was, np.ndarray) or now is not was:
                write(item, was)
        with torch.no_grad():
            for t, was in self.tensors:
                t.data.copy_(was)
        random.setstate(self.random[0])
        np.random.set_state(self.random[1])  # noqa: NPY002
        torch.set_rng_state(self.random[2])


_NONE = object()
_TABLES = ("_modules", "_parameters", "_buffers")


def _path(name: str, key: Any) -> str:
    if not isinstance(key, str) or key in _TABLES:
        return name
    return "()" if key.startswith("_") and "hook" in key else f"{name}.{key}"


def _put_dict(d: dict[Any, Any], was: dict[Any, Any]) -> None:
    if list(d) != list(was) or any(d[k] is not was[k] for k in was):
        d.clear()
        d.update(was)


def _put_list(items: Any, was: list[Any]) -> None:
    if len(items) != len(was) or any(a is not b for a, b in zip(items, was, strict=True)):
        items.clear()
        items.extend(was)


def _put_set(items: set[Any], was: set[Any]) -> None:
    if items != was:
        items.clear()
        items.update(was)


def _put_cell(cell: types.CellType, was: tuple[Any]) -> None:
    cell.cell_contents = was[0]


def _pick(names_of: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: names_of.get(k) for k in names}


def _pick_attributes(cls: type, names: tuple[str, ...]) -> dict[str, Any]:
    return {k: vars(cls).get(k) for k in names}


def _put_names(names: dict[str, Any], was: dict[str, Any]) -> None:
    for k, v in was.items():
        if names.get(k) is not v:
            names[k] = v


def _put_attributes(cls: type, was: dict[str, Any]) -> None:
    for k, v in was.items():
        if vars(cls).get(k) is not v:
            with suppress(AttributeError, TypeError):
                setattr(cls, k, v)


@contextmanager
def untouched(model: nn.Module, *, own: bool = False) -> Iterator[State]:
    """Inside, the model may run; afterwards it is as it was (``own``: its parameters and buffers too)."""
    state = State(model, own=own)
    try:
        yield state
    finally:
        state.restore()


def changes_that_count(model: nn.Module, run: Callable[[bool], Any]) -> list[str]:
    """Attributes that each run of the model changes, and not just tensors that no later run reads.

    Weight norms, spectral norms and pruning set a module's weight before each run, and models keep
    attention maps to be looked at: what was run before makes no difference to the next output.

    Args:
        run: runs the model on its example, or on other numbers (False), and gives its outputs.
    """
    with untouched(model, own=True):
        run(True)
        state = State(model, numbers=False)
        run(False)
        behind_another = pytree.tree_leaves(run(True))
        rest = state.changes(tensors=False)
        behind_itself = pytree.tree_leaves(run(True))
        if rest or len(behind_another) != len(behind_itself):
            return rest or state.changes()
        pairs = zip(behind_another, behind_itself, strict=True)
        return [] if all(_equal(a, b) for a, b in pairs) else state.changes()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    return _same(a, b)


class _Record(TorchFunctionMode):
    """Operators with their arguments, parameters by identity, and the shapes of what they give."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.calls: list[list[Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch._assert:  # its message may name the batch
            return out
        row: list[Any] = [getattr(func, "__name__", str(func))]
        for leaf in pytree.tree_leaves((args, dict(kwargs or {}), out)):
            row.extend(self.described(leaf))
        self.calls.append(row)
        return out

    def described(self, leaf: Any) -> list[Any]:
        if isinstance(leaf, Tensor):
            return [str(leaf.dtype), self.names.get(id(leaf), ""), len(leaf.shape), *leaf.shape]
        if isinstance(leaf, (bool, int, float)):
            return [leaf]
        return [type(leaf).__name__, str(leaf) if isinstance(leaf, (*_PLAIN, slice)) else ""]


def calls_at(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None, n: int
) -> list[list[Any]] | None:
    """What the model calls on inputs like these with ``n`` in the place of ``batch``: run without
    numbers. None where that fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        shape = [n, *t.shape[1:]] if t.ndim and t.shape[0] == batch else list(t.shape)
        return torch.empty(shape, dtype=t.dtype)

    try:
        own: dict[str, Tensor] = {
            name: mode.from_tensor(t) for name, t in _tensors_of(model)
        }  # one tensor, one fake
        record = _Record({id(t): name for name, t in own.items()})
        with mode:
            args, kwargs = pytree.tree_map(fake, (args, kwargs))
            with record:
                out = torch.func.functional_call(model, own, args, kwargs, tie_weights=False)
    except Exception:
        return None
    leaves = pytree.tree_leaves(out)
    record.calls.append(["output", *(d for leaf in leaves for d in record.described(leaf))])
    return record.calls


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each place of each module once: under two names of one module
    functional_call would leave what it puts there."""
    for path, module in model.named_modules():
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                yield f"{path}.{key}".removeprefix("."), t


def same_calls(one: list[list[Any]], two: list[list[Any]], three: list[list[Any]]) -> bool:
    """Whether the calls at three batches in a row differ in numbers that grow evenly alone."""
    if not len(one) == len(two) == len(three):
        return False
    for rows in zip(one, two, three, strict=True):
        if len({len(r) for r in rows}) > 1:
            return False
        for a, b, c in zip(*rows, strict=True):
            if isinstance(a, (int, float)) and isinstance(b, (int, float)) and isinstance(c, (int, float)):
                if a == b == c:
                    continue
                if abs((c - b) - (b - a)) > 1e-9 * max(1.0, abs(b)):
                    return False
            elif a != b or b != c:
                return False
    return True


def draws(target: Any, bound: Mapping[str, Any]) -> bool:
    """Whether an operator with these arguments, by the schema's names, draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    arguments = getattr(getattr(target, "_schema", None), "arguments", ())
    given = {a.name: a.default_value for a in arguments if a.has_default_value()} | dict(bound)
    if any(given.get(k, None) is False for k in ("train", "training")):
        return False
    return all(given.get(k, None) != 0 for k in ("p", "dropout_p"))
