"""Saved activation maps, packed: by a context around forward and loss, or once for a model.

PyTorch keeps the input of every convolution and normalisation and the output of every ReLU until
backward. Here ``torch.autograd.graph.saved_tensors_hooks`` puts packed ones in their places.
Exactly: the values that are not zero and a mask, gradients equal bit for bit. With ``bits``: codes
of 8 or 4 bits, rounded at random so that their mean is right. Measured in
``docs/training-memory.md``.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from actzip import heap
from actzip.activations import ROOT, Selector, Site, select_sites
from actzip.activations.hooks import Hooks
from actzip.checks import flag, shown
from actzip.errors import InputError
from actzip.training.bits import Predicate
from actzip.training.buffers import Buffers
from actzip.training.rules import CODED, CONVOLVED, ITSELF, SHAPE, Rule, Window, rule_of
from actzip.training.saved import (
    Indices,
    Kept,
    Narrowed,
    Packed,
    SavedMap,
    ShapeOnly,
    Slot,
    dense_order,
    fingerprint,
)
from actzip.training.standin import handed, unseen

__all__ = ["LayerMemory", "PackedForward", "Packing", "pack_saved", "packed_activations"]

#: Smaller tensors are kept as they are.
MIN_BYTES = 16 << 10


@dataclass
class LayerMemory:
    """What one module saves for backward, in bytes: as it is, and packed. A tensor counts where it
    is saved first."""

    saved: int = 0
    packed: int = 0


@dataclass
class Packing:
    """What a forward pass saved for backward, and what it takes packed. Parameters and buffers are
    not counted.

    Attributes:
        saved_bytes: of the memory that PyTorch would keep, each storage once.
        packed_bytes: of what is kept instead.
        largest: the largest storage among those saved.
        layers: the same by module, where that was asked for (``by_layer``).
    """

    saved_bytes: int = 0
    packed_bytes: int = 0
    largest: int = 0
    layers: dict[str, LayerMemory] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """``packed_bytes / saved_bytes``; 1 where nothing was saved."""
        return self.packed_bytes / self.saved_bytes if self.saved_bytes else 1.0


@dataclass(frozen=True)
class _Settings:
    bits: int | None
    layers: tuple[tuple[Selector, int | None], ...]
    min_bytes: int
    by_layer: bool


_current = threading.local()  # .rule: of the torch function that runs in this thread; .scope: around it
OUTSIDE = "outside"  # of all functions
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)  # run others' code


class _Functions(TorchFunctionMode):
    """Notes the rule of the function that runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = getattr(_current, "rule", OUTSIDE)
        _current.rule = OUTSIDE if func in _BACKWARD else rule_of(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            _current.rule = before

    def resume(self) -> None:
        """Where a backward pass recomputes, the hooks are at work and the mode is not: until the pass is
        over, which gives this thread back its modes, it is."""
        if torch._C._len_torch_function_stack() == 0:
            self.__enter__()  # type: ignore[no-untyped-call]


class Session:
    """One forward pass: what was packed, by storage, place and version, so that each map is packed once."""

    def __init__(self, model: nn.Module, settings: _Settings, seed: int) -> None:
        self.settings, self.seed, self.count = settings, seed, 0
        self.result, self.buffers, self.mode = Packing(), Buffers(), _Functions()
        self.stack = [ROOT]
        self.convolved, self.at_once = 0, 0  # maps saved by convolutions; which one backward reads at once
        self.bits_of = _bits_by_module(model, settings)
        # A storage's address is not used again while a weak reference to it lives.
        self.storages: dict[int, StorageWeakRef] = {}
        self.kept: set[int] = set()
        self.maps: dict[tuple[Any, ...], weakref.ref[SavedMap]] = {}
        self.owned = {
            t.untyped_storage()._cdata
            for t in (*model.parameters(), *model.buffers())
            if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
        }

    def close(self) -> None:
        """Forget what is not the graph's."""
        self.storages, self.maps, self.kept, self.owned = {}, {}, set(), set()
        if self.result.largest >= heap.LARGE:
            heap.give_back()

    # -- accounts

    def grew(self, nbytes: int) -> None:
        """Count packed bytes."""
        self.result.packed_bytes += nbytes
        if self.settings.by_layer:
            self._layer().packed += nbytes

    def _layer(self) -> LayerMemory:
        return self.result.layers.setdefault(self.stack[-1], LayerMemory())

    def _seen(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self.storages:
            self.storages[key] = StorageWeakRef(storage)
            self.result.saved_bytes += storage.nbytes()
            self.result.largest = max(self.result.largest, storage.nbytes())
            self.buffers.largest = max(self.buffers.largest, storage.nbytes())
            if self.settings.by_layer:
                self._layer().saved += storage.nbytes()
        return key

    def convolves(self, tensor: Tensor) -> bool:
        """The tensor that is saved here is a map that a convolution reads."""
        rule = getattr(_current, "rule", OUTSIDE)
        if not callable(rule) or not ordinary(tensor) or tensor.nbytes < self.settings.min_bytes:
            return False
        return rule(tensor) is CONVOLVED

    def _keep(self, tensor: Tensor, storage: int, convolved: Buffers | None = None) -> Slot:
        if storage not in self.kept:
            self.kept.add(storage)
            self.grew(tensor.untyped_storage().nbytes())
        return Kept(tensor, convolved)

    # -- the hook

    def pack(self, tensor: Tensor) -> Slot:
        """What the graph holds for ``tensor``."""
        slot: Slot = unseen(self._slot, tensor)
        return slot

    def _slot(self, tensor: Tensor) -> Slot:
        rule: Rule | str | None = getattr(_current, "rule", OUTSIDE)
        if rule is OUTSIDE:
            self.mode.resume()
        if not ordinary(tensor) or tensor.untyped_storage()._cdata in self.owned:
            return Kept(tensor)
        storage = self._seen(tensor)
        if tensor.numel() * tensor.element_size() < self.settings.min_bytes:
            return self._keep(tensor, storage)
        if tensor.nbytes >= heap.WATCHED:
            self._watch(tensor.nbytes)
        need = rule(tensor) if callable(rule) else None
        self.convolved += need is CONVOLVED
        found = self._packed(tensor, storage, need)
        return found or self._keep(tensor, storage, self.buffers if need is CONVOLVED else None)

    def _watch(self, nbytes: int) -> None:
        """The heap, while a map of so many bytes is there."""
        if self.buffers.thorough:
            heap.settle(nbytes, self.buffers.largest)
        elif nbytes >= heap.LARGE:
            heap.give_back()
        else:
            heap.look()

    def _packed(self, tensor: Tensor, storage: int, need: Any) -> Slot | None:
        if need is SHAPE:
            return ShapeOnly(tensor)
        if need is ITSELF:
            return None
        if isinstance(need, Window) and (indices := Indices.of(tensor, need)) is not None:
            self.grew(indices.nbytes)
            return indices
        if not dense_order(tensor):
            return None
        if tensor.dtype in (torch.int64, torch.int32, torch.int16):
            narrow = Narrowed.of(tensor)
            if narrow is not None:
                self.grew(narrow.nbytes)
            return narrow
        n = tensor.numel()
        flat = tensor.detach().as_strided((n,), (1,), tensor.storage_offset())
        if tensor.dtype == torch.bool:
            saved = self._map(flat, storage)
            saved.pack_bits(flat)
            return Packed(saved, tensor, "bits")
        if not tensor.is_floating_point() or tensor.element_size() not in (2, 4, 8):
            return None
        saved = self._map(flat, storage)
        if isinstance(need, Predicate) and saved.pack_test(flat, need):
            return Packed(saved, tensor, need)
        convolved = self.buffers if need is CONVOLVED else None
        coded = need in (CODED, CONVOLVED)
        bits = self.bits_of.get(self.stack[-1], self.settings.bits) if coded else None
        if tensor.is_leaf or tensor.dtype == torch.float64:
            bits = None
        if bits is not None and saved.values is None and saved.pack_coded(flat, bits, self.next_seed()):
            return Packed(saved, tensor, bits, convolved)
        if convolved and self.convolved == self.at_once and saved.values is None:
            return None  # packed, it would be in memory twice
        return Packed(saved, tensor, None, convolved) if saved.pack_values(flat) else None

    def _map(self, flat: Tensor, storage: int) -> SavedMap:
        key = (
            storage,
            flat.storage_offset(),
            flat.numel(),
            flat.dtype,
            flat._version,
            _used_on_stream(flat),
        )
        found = self.maps.get(key)
        saved = None if found is None else found()
        print_now = fingerprint(flat)
        if saved is None or saved.fingerprint != print_now:
            saved = SavedMap(flat, self.grew, print_now, self.buffers)
            saved.share_restored(flat)
            self.maps[key] = weakref.ref(saved)
        return saved

    def next_seed(self) -> int:
        """Another one each time, the same in every run."""
        self.count += 1
        return (self.seed + self.count * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF


def ordinary(tensor: Tensor) -> bool:
    """A plain tensor in memory that is not a parameter: what packing understands."""
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_leaf and tensor.requires_grad)
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_complex()
        and not tensor.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _used_on_stream(tensor: Tensor) -> int:
    """The stream of a device that packs here, and in backward restores: what another one does is not
    waited for. The tensor may be freed before the stream has packed it."""
    if not tensor.is_cuda:
        return 0
    stream = torch.cuda.current_stream(tensor.device)
    tensor.record_stream(stream)
    return int(stream.cuda_stream)


def _bits_by_module(model: nn.Module, settings: _Settings) -> dict[str, int | None]:
    """Bits by module name, for modules that a selector names, and all inside them; later selectors win."""
    if not settings.layers:
        return {}
    names = {name or ROOT: module for name, module in model.named_modules()}
    sites = [
        Site(name, "module", "" if name == ROOT else name, type(module).__name__)
        for name, module in names.items()
    ]
    found: dict[str, int | None] = {}
    for selector, bits in settings.layers:
        for site in select_sites(sites, model, [selector]):
            inside = site.module + "." if site.module else ""
            found |= {n: bits for n in names if n == site.name or n.startswith(inside)}
    return found


class Scope:
    """What a context puts in PyTorch's way: entered once, left as often as interrupts make it try."""

    def __init__(
        self,
        model: nn.Module,
        session: Session,
        pack: Callable[[Tensor], Any],
        unpack: Callable[[Any], Tensor],
    ) -> None:
        self.model, self.session = model, session
        self.mode, self.names = session.mode, Hooks()
        self.rule = getattr(_current, "rule", OUTSIDE)  # of the function that this context is in
        self.outer = current_scope()
        self.pack, self.pushed = _eager(pack), False
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, _eager(unpack))

    def enter(self) -> None:
        """From here on what is saved is packed."""
        settings, stack = self.session.settings, self.session.stack
        if settings.layers or settings.by_layer:
            for name, module in self.model.named_modules():
                self.names.before(module, lambda m, a, name=name or ROOT: stack.append(name))
                self.names.after(module, lambda m, a, o: _popped(stack), always=True)
        self.hooks.__enter__()
        self.pushed = True
        self.mode.__enter__()  # type: ignore[no-untyped-call]
        _current.scope = self

    def on_top(self) -> bool:
        """The hooks are still in force."""
        if top_hooks is None:
            return self.pushed
        top = top_hooks(True)
        return bool(top) and top[0] is self.pack

    def leave(self) -> None:
        """Nothing is left, whatever was there."""
        while self.mode in torch.overrides._get_current_function_mode_stack():
            torch.overrides._pop_mode()
        while self.on_top():
            self.pushed = False
            self.hooks.__exit__()
        _current.rule, _current.scope = self.rule, self.outer
        self.names.remove()
        self.session.close()


def current_scope() -> Scope | None:
    """The innermost scope that this thread is in."""
    return getattr(_current, "scope", None)


#: The hooks in force; None before PyTorch 2.5.
top_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


def _popped(stack: list[str]) -> None:
    stack.pop()


def _check_bits(bits: Any, where: str) -> None:
    if bits is not None and (not isinstance(bits, int) or bits not in (4, 8)):
        raise InputError(f"{where} is None (exact), 8 or 4, not {shown(bits)}")


def _settings(
    model: nn.Module,
    bits: int | None,
    layers: Mapping[Selector, int | None] | None,
    min_bytes: int,
    by_layer: bool,
) -> _Settings:
    if not isinstance(model, nn.Module):
        raise InputError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    _check_bits(bits, "bits")
    flag(by_layer, "by_layer")
    if layers is not None and not isinstance(layers, Mapping):
        raise InputError(f"layers maps names to bits ({{'layer1': 8}}), not {layers!r}")
    for name, own in (layers or {}).items():
        _check_bits(own, f"layers[{name!r}]")
    if isinstance(min_bytes, bool) or not isinstance(min_bytes, int) or min_bytes < 0:
        raise InputError(f"min_bytes is a number of bytes, 0 and more, not {min_bytes!r}")
    settings = _Settings(bits, tuple((layers or {}).items()), min_bytes, by_layer)
    _bits_by_module(model, settings)  # raises for a name that is not there
    return settings


def _seed(settings: _Settings, generator: torch.Generator | None) -> int:
    """From torch's generator, so that seeds reproduce; exact packing draws nothing."""
    if settings.bits is None and all(bits is None for _, bits in settings.layers):
        return 0
    return int(torch.randint(1 << 62, (), generator=generator))


@contextmanager
def _packing(model: nn.Module, settings: _Settings, generator: torch.Generator | None) -> Iterator[Packing]:
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # what is packed is known only when it runs
    session = _eager(Session)(model, settings, _seed(settings, generator))
    scope = Scope(model, session, session.pack, handed)
    leave = _eager(scope.leave)
    try:
        _eager(scope.enter)()
        yield session.result
        leave()
    finally:
        try:
            leave()
        finally:  # where the first was interrupted
            leave()


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as it is, for a compiler that is at work where it is called."""
    if "torch._dynamo" not in sys.modules:
        return function
    disabled: Callable[..., Any] = torch._dynamo.disable(function)
    return disabled


@contextmanager
def packed_activations(
    model: nn.Module,
    bits: int | None = None,
    *,
    layers: Mapping[Selector, int | None] | None = None,
    min_bytes: int = MIN_BYTES,
    generator: torch.Generator | None = None,
    by_layer: bool = False,
) -> Iterator[Packing]:
    """While it is open, what autograd saves for backward is packed; put it around forward and loss.

    with packed_activations(model):
        loss = criterion(model(x), y)
    loss.backward()

    Exactly (``bits=None``): gradients are equal bit for bit to those without it. With bits, the inputs of
    convolutions, linear layers and normalisations, and maps of smooth activations, are estimated:
    rounded at random so that the mean is right, zeros exact; everything else stays exact. Contexts
    nest; the innermost decides.

    Args:
        model: its parameters and buffers are never packed; ``layers`` names its modules.
        bits: None, 8 or 4.
        layers: other bits for single modules and what is inside them:
            ``{"layer4": 4, "fc": None}``. Names, globs, ``re:...`` and types, as in
            :mod:`actzip.activations`; later ones win.
        min_bytes: smaller tensors are kept as they are.
        generator: the source of the rounding's seed, one draw a context; torch's own where None.
        by_layer: count by module too (:attr:`Packing.layers`).

    Yields:
        What was saved and what it takes: :class:`Packing`, growing while the model runs.

    Raises:
        InputError: an argument is unusable. LayerError: ``layers`` names a module that is not there.
        TrainingError: in backward, where a saved tensor was changed in place since, as PyTorch does.
    """
    with _packing(model, _settings(model, bits, layers, min_bytes, by_layer), generator) as result:
        yield result


class PackedForward:
    """The ``forward`` of a model under :func:`pack_saved`.

    Attributes:
        last: the :class:`Packing` of the last forward pass.
    """

    def __init__(self, model: nn.Module, settings: _Settings) -> None:
        self.model, self.settings = model, settings
        self.forward: Callable[..., Any] = model.forward
        self.last = Packing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        with _packing(self.model, self.settings, None) as self.last:
            return self.forward(*args, **kwargs)

    def remove(self) -> None:
        """The model's own forward again."""
        if self.model.__dict__.get("forward") is self:
            del self.model.__dict__["forward"]


def pack_saved(
    model: nn.Module,
    bits: int | None = None,
    *,
    layers: Mapping[Selector, int | None] | None = None,
    min_bytes: int = MIN_BYTES,
) -> PackedForward:
    """From now on every forward pass of ``model`` that records gradients is packed, as by
    :func:`packed_activations`.

    The loss is outside. A copy of the model (``copy.deepcopy``, an EMA) packs too. Called again, it
    changes the settings.

    Returns:
        What packs: ``.remove()`` ends it, ``.last`` is what the last pass saved.

    Raises:
        InputError, LayerError: as :func:`packed_activations`.
    """
    settings = _settings(model, bits, layers, min_bytes, False)
    before = model.__dict__.get("forward")
    if isinstance(before, PackedForward):
        before.settings = settings
        return before
    packed = PackedForward(model, settings)
    model.__dict__["forward"] = packed
    return packed
