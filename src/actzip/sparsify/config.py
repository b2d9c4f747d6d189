"""What a sparsification is told: plain values only, so that a recipe file can hold them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from actzip.checks import flag, number, one_of, shown, whole
from actzip.errors import InputError
from actzip.sparsify.penalties import KINDS, WEIGHTINGS

__all__ = ["SparsifyConfig"]


#: Of fields that earlier versions did not have: at their default they are left out of what identifies a run.
_LATER = {"later": True}


_ONE_OF: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("cosine", "onecycle", "constant"),
    "precision": ("float32", "bfloat16"),
    "penalty": KINDS,
    "weighting": WEIGHTINGS,
    "thresholds": ("none", "learned", "calibrated"),
    "learned_per": ("channel", "layer"),
}
_WHOLE = {
    "epochs": 1,
    "accumulate": 1,
    "penalty_every": 1,
    "checks": 1,
    "threshold_samples": 1,
    "check_samples": 0,
    "seed": 0,
}
_BETWEEN: dict[str, tuple[float, float]] = {
    "epochs": (1, 100_000),
    "lr": (1e-12, 1e3),
    "momentum": (0, 1),
    "weight_decay": (0, 10),
    "label_smoothing": (0, 1),
    "accumulate": (1, 1 << 20),
    "ema": (0, 0.999999),
    "distill": (0, 1),
    "distill_maps": (0, 1e12),
    "temperature": (1e-3, 1e3),
    "mixup": (0, 1e3),
    "ramp": (0, 1),
    "release": (0, 1),
    "beta": (1e-6, 1e6),
    "elements_share": (0, 1),
    "penalty_every": (1, 1 << 20),
    "alpha_step": (1.0001, 100),
    "alpha_start": (1e-12, 1e12),
    "checks": (1, 10_000),
    "threshold_speedup": (0, 1e6),
    "threshold_density": (0, 1),
    "threshold_samples": (1, 1 << 20),
    "speedup": (0, 1e6),
}


@dataclass(frozen=True)
class SparsifyConfig:
    """How to sparsify. Every field has a default; wrong values raise InputError naming the field.

    Training:
        epochs, lr: passes over the training data, and the highest learning rate.
        optimizer: ``sgd`` (Nesterov), ``adam`` or ``adamw``; ``momentum``, ``weight_decay`` (not on vectors).
        schedule: ``cosine`` (to 0), ``onecycle`` (a rise over 30 %, then cosine) or ``constant``;
        ``warmup`` in epochs. label_smoothing: of the task loss. ``clip``: largest gradient norm (0:
        no clipping). accumulate: batches a step. ``precision``: ``float32`` or ``bfloat16``
        (autocast; float32, with a warning, on a CPU for
            which torch has no bfloat16 convolutions and would be ten times slower).
        memory: what waits for backward: ``plain`` (as PyTorch keeps it), ``exact`` (packed, same gradients),
            8 or 4 bits (:func:`actzip.training.packed_activations`).
        ema: decay of the running mean of the weights, which is what is evaluated and returned (0: off).
        distill: share of the loss that is the divergence from the original's outputs at
        ``temperature``; 1: labels are
            not used and may be absent.
        distill_maps, distill_layers: strength of a second term: the mean over the named modules of
        the squared distance of
            their outputs from the original's, relative to the original's mean square. It says far
            more a sample than the few numbers of the last layer.
        mixup: each batch is mixed with a permutation of itself, l x + (1 - l) x', l drawn from
        Beta(mixup, mixup), and so are the
            losses of its labels (Zhang et al., ICLR 2018, arXiv:1710.09412). With ``distill`` the
            original says what the mixed images are: many more of them than there are samples. The
            penalty sees the maps of the mixed images. 0: off.
        freeze_norm: BatchNorm layers go on using their running statistics, as is right for small batches.
        channels_last: train in that memory format.
        seed: of torch's generator; the order of data is the loader's own.
    Penalty (see :class:`~actzip.sparsify.ActivationPenalty`):
        penalty: ``tl1``, ``l1``, ``log`` or ``hoyer``. ``alpha``: its strength; 0: none (the
        control); a mapping: a number a
            site; ``auto``: see below. ``weighting``, ``elements_share``, ``beta``, ``normalise``,
            ``layers``, ``ignore``: likewise.
        penalty_every: the penalty is part of every n-th loss only, n times as strong: its cost in
        time is 1/n. ramp: share of all steps over which alpha rises linearly to its value.
        ``release``: share of all steps, the last
            ones, over which a given alpha falls linearly to 0: the task loss settles on the zeros
            that there are, without the pull of the penalty (as a lasso is refitted on its support).
        thresholds: ``none``; ``learned``: every penalised ReLU gets a trained threshold, one a
        ``learned_per``
            (``channel`` or ``layer``); ``calibrated``: thresholds are found before the first step,
            on the first ``threshold_samples`` training samples, one a ``learned_per``, for the
            ``threshold_speedup`` or ``threshold_density`` asked for (see
            :func:`~actzip.sparsify.calibrate_thresholds`), layers behind them are repaired, and the
            thresholds stay as they are while the weights learn to live with them. With ``distill``
            they learn from the original without thresholds; with ``alpha: 0`` nothing else makes
            zeros.
    alpha="auto" (one run; needs labelled validation data):
        floor: lowest validation accuracy in [0, 1]; None: the original's, plus ``floor_margin``.
        alpha_start, alpha_step: where alpha begins, and the factor by which a check raises or lowers it.
        checks: checks an epoch. ``check_samples``: at most so many validation samples a check (0: all).
        speedup: a theoretical speed-up to reach instead of a floor (0: none). Alpha is then
        steered, at every renewal of
            the densities, by how far the work of the maps is from MACs / ``speedup``, which falls
            linearly from the original's over ``ramp``; validation data may be absent. Needs
            ``weighting`` ``macs`` or ``mixed``.
    """

    epochs: int = 5
    lr: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    clip: float = 0.0
    accumulate: int = 1
    precision: str = "float32"
    ema: float = 0.0
    distill: float = 0.0
    distill_maps: float = field(default=0.0, repr=False, metadata=_LATER)
    distill_layers: Any = field(default=None, repr=False, metadata=_LATER)
    freeze_norm: bool = field(default=False, repr=False, metadata=_LATER)
    mixup: float = field(default=0.0, repr=False, metadata=_LATER)
    memory: str | int = field(default="plain", repr=False, metadata=_LATER)
    temperature: float = 4.0
    channels_last: bool = False
    seed: int = 0
    penalty: str = "tl1"
    alpha: Union[float, str, Mapping[str, float]] = 1.0
    weighting: str = "macs"
    elements_share: float = field(default=0.5, repr=False, metadata=_LATER)
    penalty_every: int = field(default=1, repr=False, metadata=_LATER)
    beta: float = 0.5
    normalise: Union[bool, None] = None
    layers: Any = None
    ignore: Any = None
    ramp: float = 0.2
    release: float = field(default=0.0, repr=False, metadata=_LATER)
    thresholds: str = "none"
    learned_per: str = "channel"
    threshold_speedup: float = field(default=0.0, repr=False, metadata=_LATER)
    threshold_density: float = field(default=0.0, repr=False, metadata=_LATER)
    threshold_samples: int = field(default=256, repr=False, metadata=_LATER)
    floor: Union[float, None] = None
    floor_margin: float = 0.0
    alpha_start: float = 1.0
    alpha_step: float = 1.4
    checks: int = 4
    check_samples: int = 0
    speedup: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in _ONE_OF.items():
            one_of(getattr(self, name), name, allowed)
        for name, least in _WHOLE.items():
            whole(getattr(self, name), name, least)
        for name in ("freeze_norm", "channels_last", *(("normalise",) if self.normalise is not None else ())):
            flag(getattr(self, name), name)
        for name in ("warmup", "clip"):
            number(getattr(self, name), name, 0)
        number(self.floor_margin, "floor_margin", -1, 1)
        known = isinstance(self.memory, (str, int)) and self.memory in ("plain", "exact", 8, 4)
        if not known or isinstance(self.memory, bool):
            raise InputError(f"memory must be plain, exact, 8 or 4, not {shown(self.memory)}")
        for name, (low, high) in _BETWEEN.items():
            self._between(name, low, high)
        if self.distill_maps > 0 and not self.distill_layers:
            raise InputError("distill_maps needs distill_layers, names of modules whose outputs are compared")
        self._check_thresholds()
        self._check_alpha()

    def _between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{name} must be between {low:g} and {high:g}, not {value!r}")

    def _check_thresholds(self) -> None:
        wanted = (self.threshold_speedup > 0) + (self.threshold_density > 0)
        if self.thresholds == "calibrated":
            if wanted != 1:
                raise InputError(
                    "thresholds='calibrated' needs threshold_speedup (above 1) or "
                    "threshold_density (below 1), one of the two"
                )
            if self.threshold_speedup:
                self._between("threshold_speedup", 1, 1e6)
        elif wanted:
            raise InputError(
                "threshold_speedup and threshold_density are targets of thresholds='calibrated', not of "
                f"thresholds={self.thresholds!r}"
            )

    def _check_alpha(self) -> None:
        if self.floor is not None:
            self._between("floor", 0, 1)
        if self.release and self.alpha == "auto":
            raise InputError("release lowers a given alpha at the end: it does not go with alpha='auto'")
        if self.speedup > 0:
            if self.alpha != "auto" or self.weighting not in ("macs", "mixed"):
                raise InputError(
                    "speedup steers alpha by the work of the maps: it needs alpha='auto' and "
                    f"weighting='macs' or 'mixed', not alpha={self.alpha!r} and "
                    f"weighting={self.weighting!r}"
                )
            self._between("speedup", 1, 1e6)
        if isinstance(self.alpha, str):
            if self.alpha != "auto":
                raise InputError(
                    f"alpha must be a number, a mapping of site names or 'auto', not {self.alpha!r}"
                )
        elif not isinstance(self.alpha, Mapping):
            self._between("alpha", 0, 1e30)

    def identity(self) -> dict[str, Any]:
        """The settings by name, without those of :data:`_LATER` that stand at their default: runs
        of earlier versions with the same settings have the same identity, and go on."""
        later = {f.name: f.default for f in dataclasses.fields(self) if f.metadata.get("later")}
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in later or v != later[k]}

    def mark(self) -> str:
        """:meth:`identity` as text, for checkpoints."""
        more = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("later")}
        kept = {k: v for k, v in more.items() if k in self.identity()}
        return repr(self) + (repr(kept) if kept else "")

    @classmethod
    def of(cls, value: SparsifyConfig | Mapping[str, Any] | None) -> SparsifyConfig:
        """A config from itself, from a mapping of field names, or the defaults.

        Raises:
            InputError: an unknown field; near matches are named.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InputError(f"a recipe is a SparsifyConfig or a mapping, not {type(value).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(known)}"
                raise InputError(f"sparsify has no setting {key!r}{hint}")
        return cls(**value)
