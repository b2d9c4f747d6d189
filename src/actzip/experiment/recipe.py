"""Recipes: one YAML file an experiment, checked before anything runs.

A wrong key or value raises :class:`~actzip.errors.RecipeError` that names the file, the line, the
key and what is allowed there. The settings of training stages are the fields of
:class:`actzip.sparsify.SparsifyConfig`, so a method added there can be used in a recipe at once.
docs/recipes.md describes every key.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from actzip.errors import ActzipError, RecipeError
from actzip.sparsify import SparsifyConfig

__all__ = ["Recipe", "load_recipe", "parse_recipe"]

Where = tuple[Any, ...]

#: Fields of SparsifyConfig that belong to the penalty; a training stage without one does not have them.
PENALTY_FIELDS = frozenset(
    {
        "penalty",
        "alpha",
        "weighting",
        "elements_share",
        "penalty_every",
        "beta",
        "normalise",
        "layers",
        "ignore",
        "ramp",
        "release",
        "thresholds",
        "learned_per",
        "threshold_speedup",
        "threshold_density",
        "threshold_samples",
        "floor",
        "floor_margin",
        "alpha_start",
        "alpha_step",
        "checks",
        "check_samples",
        "speedup",
        "distill",
        "temperature",
    }
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelPart(_Part):
    """Which network: a name or import path, constructor arguments, and weights to begin with.

    ``control``: weights of a control that another recipe trained, measured beside. ``teacher``:
    weights of the network that ``distill`` of the stage ``sparsify`` learns from; that which
    training begins with where not given. ``thresholds``: the file of thresholds that another recipe
    wrote beside ``weights``.
    """

    name: str
    args: dict[str, Any] = {}
    weights: str | None = None
    control: str | None = None
    teacher: str | None = None
    thresholds: str | None = None


class DataPart(_Part):
    """Which images, and how they are served."""

    name: str
    test: str | None = None
    validation: int = Field(gt=0)
    batch_size: int = Field(128, gt=0)
    eval_batch_size: int = Field(500, gt=0)
    augment: Literal["none", "crop_flip"] = "none"
    image_size: int | None = Field(None, gt=0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    limit: int | None = Field(None, gt=0)
    test_limit: int | None = Field(None, gt=0)


class ThresholdsPart(_Part):
    """Stage 1b, after ``sparsify`` or of the baseline: thresholds without training, exactly one of
    the targets ``density``, ``speedup`` (theoretical) and ``agree``; calibrated on validation
    images (:func:`actzip.sparsify.calibrate_thresholds`). ``repair`` gives the layers behind them
    what they were trained for.
    """

    density: float | None = Field(None, gt=0, le=1)
    speedup: float | None = Field(None, ge=1)
    agree: float | None = Field(None, gt=0, le=1)
    per: Literal["layer", "channel"] = "layer"
    by: Literal["elements", "macs"] | None = None
    samples: int = Field(128, gt=0)
    repair: bool = False

    def identity(self) -> dict[str, Any]:
        """What a stage is known by: as before there was a repair where there is none."""
        return self.model_dump(exclude=None if self.repair else {"repair"})

    @model_validator(mode="after")
    def _one(self) -> ThresholdsPart:
        given = [n for n in ("density", "speedup", "agree") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of density, speedup and agree, not {' and '.join(given) or 'none'}"
            )
        return self


class LowBitsPart(_Part):
    """Training with the quantizers in place, of the widths in ``bits``, on the training images.

    Weights by the straight-through estimator, scales as learned step sizes; ``rate`` is the weight
    in the loss of the estimated bits an element (:class:`actzip.quantize.train.RatePenalty`),
    looked at on ``rate_share`` of each batch; ``distill`` the share of the loss that is the
    divergence from the float network's outputs. ``mixup``, ``precision`` and ``freeze_norm`` as in
    :func:`actzip.quantize.train.finetune`.
    """

    bits: list[int] = Field([4], min_length=1)
    epochs: int = Field(gt=0)
    lr: float = Field(1e-3, gt=0)
    scale_lr: float = Field(2e-3, ge=0)
    weight_decay: float = Field(1e-2, ge=0)
    rate: float = Field(0.15, ge=0)
    rate_share: float = Field(0.25, gt=0, le=1)
    distill: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    clip: float = Field(0.0, ge=0)
    observer: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    mixup: float = Field(0.0, ge=0, le=1e3)
    precision: Literal["float32", "bfloat16"] = "float32"
    freeze_norm: bool = False

    def identity(self) -> dict[str, Any]:
        """The settings by name; those of later versions only where they are used, so that earlier
        runs stay valid."""
        later = {"mixup", "precision", "freeze_norm"}
        used = later & self.model_dump(exclude_defaults=True).keys()
        return self.model_dump(exclude=later - used)


class QuantizePart(_Part):
    """Stage 2: at which widths, by which observer; ``train``: some of them with training;
    ``control``: the control too."""

    bits: list[int] = Field([16, 8], min_length=1)
    observer: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    per: Literal["tensor", "channel"] = "tensor"
    percentile: float = Field(99.99, gt=0, le=100)
    calibration: int = Field(1000, gt=0)
    control: bool = True
    train: LowBitsPart | None = None

    @model_validator(mode="after")
    def _widths(self) -> QuantizePart:
        for bits in self.bits:
            if not 4 <= bits <= 16:
                raise ValueError(f"bits: 4 to 16 are possible, not {bits}")
        for bits in self.train.bits if self.train is not None else ():
            if bits not in self.bits:
                raise ValueError(f"train: its bits must be among {self.bits}, not {bits}")
        return self


class EncodePart(_Part):
    """Stage 3: which codecs, over how many test images, how many images share a blob."""

    codecs: list[str] = Field(["seg"], min_length=1)
    images: int = Field(1000, gt=0)
    images_per_blob: int = Field(1, gt=0)


class TargetsPart(_Part):
    """What the experiment must reach; each is compared with what was measured and reported as met or not.

    ``density_reduction``: density of the baseline / density of the sparsified network.
    ``speedup_over_control``: effective MACs of the control / effective MACs of the sparsified
    network. ``accuracy_over_control``: points (0.1 is a tenth of a percent). ``gain_BITS``:
    compression gain against float32 of the sparsified network at that width, headers included, best
    codec of the recipe; ``accuracy_BITS_over_control``: points, at that width.
    """

    density_reduction: float | None = None
    speedup_over_control: float | None = None
    accuracy_over_control: float | None = None
    gain_16: float | None = None
    gain_8: float | None = None
    gain_4: float | None = None
    accuracy_16_over_control: float | None = None
    accuracy_8_over_control: float | None = None
    accuracy_4_over_control: float | None = None


def _training_part(name: str, doc: str, leave_out: frozenset[str], **more: Any) -> type[_Part]:
    """A part with the fields of SparsifyConfig; values are checked by it too."""
    hints = typing.get_type_hints(SparsifyConfig)
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(SparsifyConfig):
        if f.name in leave_out or f.name == "seed":
            continue
        default = ... if f.name == "epochs" else f.default
        kind = hints[f.name]
        if kind is bool or f.name in ("layers", "ignore"):
            fields[f.name] = (kind, default)
        else:
            fields[f.name] = (kind, Field(default))

    def check(self: Any) -> Any:
        try:
            self.config(0)
        except ActzipError as error:
            raise ValueError(str(error)) from error
        return self

    def config(self: Any, seed: int, **changes: Any) -> SparsifyConfig:
        values = {k: getattr(self, k) for k in fields if k not in more}
        return SparsifyConfig(**{**values, **changes, "seed": seed})

    made = create_model(
        name,
        __base__=_Part,
        __validators__={"check": model_validator(mode="after")(check)},  # type: ignore[dict-item]
        **fields,
        **more,
    )
    made.__doc__ = doc
    made.config = config  # type: ignore[attr-defined]
    return made


TrainPart = _training_part("TrainPart", "Stage 0: training from fresh or given weights.", PENALTY_FIELDS)
SparsifyPart = _training_part(
    "SparsifyPart",
    "Stage 1: fine-tuning with a penalty. ``control``: also without one, for the same epochs and schedule.",
    frozenset(),
    control=(bool, True),
)


class Recipe(_Part):
    """An experiment: train (or load), sparsify beside a control, threshold, quantize, encode; and
    what it must reach.

    ``continues``: the files of the recipes, beside this one, whose runs made what ``model`` begins with.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = ""
    seed: int = Field(0, ge=0, lt=2**31)
    continues: list[str] = []
    model: ModelPart
    data: DataPart
    train: TrainPart | None = None  # type: ignore[valid-type]
    sparsify: SparsifyPart | None = None  # type: ignore[valid-type]
    thresholds: ThresholdsPart | None = None
    quantize: QuantizePart | None = None
    encode: EncodePart | None = None
    targets: TargetsPart = TargetsPart()

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        given = self.model.weights or self.model.args.get("weights") or self.model.args.get("pretrained")
        if self.train is None and not given:
            raise ValueError(
                "train: without model.weights (or model.args.weights) there must be a train stage"
            )
        distilled = getattr(self.sparsify, "distill", 0) or getattr(self.sparsify, "distill_maps", 0)
        if self.model.teacher is not None and not distilled:
            raise ValueError("model.teacher: nothing is distilled from it; it needs sparsify.distill above 0")
        if self.thresholds is not None and getattr(self.sparsify, "thresholds", "none") != "none":
            raise ValueError("thresholds: sparsify.thresholds has found them already")
        if self.encode is not None and self.quantize is None:
            raise ValueError("encode: needs a quantize stage, which makes the integers")
        return self


_MOST = 10_000
"""Values of a recipe: aliases of aliases would be without end."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number, as everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or holds a wrong key or value: file,
            line, key and what is allowed are named.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        near = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        hint = f"; there: {', '.join(near)}" if near else ""
        if moved := _moved(file):
            hint = f"; it is {moved} now"
        raise RecipeError(f"cannot read the recipe {file}: {reason}{hint}") from error
    recipe = parse_recipe(text, str(file))
    made_by(recipe, file)
    return recipe


def made_by(recipe: Recipe, file: Path) -> dict[str, Path]:
    """Name -> file of the recipes that ``recipe``, read from ``file``, continues; those that they
    continue included.

    Raises:
        RecipeError: one is missing or wrong, they continue each other in a circle, or ``model``
            names the run of another.
    """
    found: dict[str, Path] = {}

    def visit(one: Recipe, place: Path, above: tuple[Path, ...]) -> None:
        for name in one.continues:
            path = place.parent / name
            if not path.is_file():
                raise RecipeError(f"{place}: continues: there is no {path}")
            if path.resolve() in above:
                raise RecipeError(f"{place}: continues: {name} goes on from this recipe itself")
            other = parse_recipe(path.read_text(encoding="utf-8"), str(path))
            found[other.name] = path
            visit(other, path, (*above, path.resolve()))

    visit(recipe, file, (file.resolve(),))
    for key, (path, run) in runs_of(recipe).items():
        if recipe.continues and run not in found:
            raise RecipeError(
                f"{file}: model.{key}: {path} is of the run {run!r}, which none of the recipes "
                f"under continues makes: they make {', '.join(found)}"
            )
    return found


def runs_of(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Keys of ``model`` whose file another run made (``runs/NAME/FILE``): key -> (path, NAME)."""
    given = {k: getattr(recipe.model, k) for k in ("weights", "control", "teacher", "thresholds")}
    return {k: (v, Path(v).parts[1]) for k, v in given.items() if v and re.match(r"runs/[^/]+/", v)}


def _moved(file: Path) -> Path | None:
    """Where a recipe is that lay beside the folders (``MODEL-DATA-WHAT.yaml``) once."""
    for folder in sorted(file.parent.glob("*-*/"), key=lambda f: -len(f.name)):
        if file.stem == folder.name or file.stem.startswith(f"{folder.name}-"):
            new = folder / f"{file.stem[len(folder.name) + 1 :] or 'sparsify'}.yaml"
            if new.is_file():
                return new
    return None


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """The recipe in YAML ``text``; ``name`` stands for the file in messages. Errors as
    :func:`load_recipe`."""
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(f"{name}: not YAML: {error}") from error
    try:
        node = loader.get_single_node()
        lines: dict[Where, int] = {}
        if node is not None:
            _walk(node, (), lines, name)
        values = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{mark.line + 1}" if mark else "?"
        raise RecipeError(f"{name}, line {line}: not YAML: {error.problem or error.context}") from error
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date of no calendar, an unhashable key
        raise RecipeError(f"{name}: not YAML: {error}") from error
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply") from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
    if not isinstance(values, Mapping):
        raise RecipeError(f"{name}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(e, lines, name) for e in error.errors())) from error


def _walk(node: yaml.Node, where: Where, lines: dict[Where, int], name: str) -> None:
    if len(lines) > _MOST:
        raise RecipeError(f"{name}: more than {_MOST} values (an alias stands for all that it names)")
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*where, key.value)
            if path in lines:
                raise RecipeError(
                    f"{name}, line {key.start_mark.line + 1}: {_dotted(path)} is there twice (line "
                    f"{lines[path]})"
                )
            lines[path] = key.start_mark.line + 1
            _walk(value, path, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*where, i), lines, name)


def _dotted(where: Where) -> str:
    return ".".join(str(w) for w in where) or "recipe"


def _fields(where: Where) -> dict[str, Any]:
    """The fields of the part at ``where``."""
    part: Any = Recipe
    for key in where:
        field = getattr(part, "model_fields", {}).get(key)
        if field is None:
            return {}
        part = next(
            (a for a in (field.annotation, *typing.get_args(field.annotation)) if hasattr(a, "model_fields")),
            None,
        )
    return getattr(part, "model_fields", {})


def _explain(error: Any, lines: dict[Where, int], name: str) -> str:
    where: Where = tuple(error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    kind = error["type"]
    if kind == "value_error":  # raised by a part as a whole: its message begins with, or names, the key
        names = [k for k in _fields(where) if re.match(rf"{re.escape(k)}\b", message)]
        if names:
            where = (*where, names[0])
    known = where
    while known not in lines and known:
        known = known[:-1]
    if known != where and where[: len(known)] == known and kind not in ("missing", "value_error"):
        where = known  # pydantic adds the member of a union that it tried
    line = lines.get(known, 1)
    if kind == "extra_forbidden":
        allowed = list(_fields(where[:-1]))
        near = difflib.get_close_matches(str(where[-1]), allowed, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        message = f"there is no such key; {hint}allowed: {', '.join(allowed)}"
    elif kind == "missing":
        message = "this key is needed"
    else:
        given = error.get("input")
        if not isinstance(given, (dict, BaseModel)) and kind != "value_error":
            message += f", not {given!r}"
    return f"{name}, line {line}: {_dotted(where)}: {message}"
