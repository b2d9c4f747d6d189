"""Runs a recipe: each stage once, its result kept on disk, so that a run killed at any moment goes
on where it was.

What a run writes into its folder:
    results.json              every figure; for one recipe, seed and machine the same, but for "run"
    report.html               the same as one page, without anything from the network
    baseline.safetensors ...  weights after each stage (and NAME.thresholds.json, NAME.BITS.quant.json)
    stages/NAME/              last.pt after each epoch (weights, optimiser, random state), then result.json
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from actzip import cpu
from actzip.activations import get_thresholds, load_thresholds, set_thresholds
from actzip.data import Images, Loader, resolve, split
from actzip.errors import DataError, RecipeError
from actzip.experiment.coding import code_maps
from actzip.experiment.recipe import PENALTY_FIELDS, LowBitsPart, Recipe, ThresholdsPart, runs_of
from actzip.experiment.report import render
from actzip.files import write_text
from actzip.models import load_weights, save_weights
from actzip.models import resolve as resolve_model
from actzip.quantize import quantize
from actzip.quantize.files import load_quantized, save_quantization, save_quantized
from actzip.quantize.train import RatePenalty, finetune
from actzip.sparsify import SparsifyConfig, calibrate_thresholds, measure, sparsify, sparsify_result
from actzip.sparsify.thresholds import put_parameters
from actzip.training.precision import has_bfloat16

__all__ = ["SCHEMA", "reproduce"]

SCHEMA = "actzip-experiment-1"

#: How often an epoch passes over a stand-in, so that training takes steps enough to learn something.
_STAND_IN_PASSES = 10

#: Called with plain dicts: {"stage": name, "kind": "start" | "done" | "cached" | "step" | "epoch" |
#: "low_bits_epoch" | "images", ...}.
Progress = Callable[[dict[str, Any]], None]


def reproduce(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    download: bool = True,
    progress: Progress | None = None,
    only: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Run ``recipe`` in the folder ``out`` and give its results, which are in ``out/results.json`` too.

    Stages that an earlier run in ``out`` finished with the same settings and data are not done
    again; a training stage that was stopped goes on after its last complete epoch. Either way the
    figures are those of an unbroken run.

    Args:
        data: where to look for data sets first.
        fresh: forget earlier runs in ``out``.
        download: whether a data set that is nowhere may be downloaded.
        only: train this stage (``baseline``, ``control`` or ``sparse``) and what it begins from,
            and leave the rest, with an empty result, to a later run without ``only``. Control and
            sparse may be trained at the same time, also in the same folder once its baseline is
            there.
        trust: whether a recipe may name Python code to import and call as its model.

    Raises:
        DataError: data, weights or the folder are missing or unusable.
        RecipeError: the recipe's parts do not fit each other or the data (the key is named).
        TrainingError: the loss is not finite.
    """
    if only not in (None, "baseline", "control", "sparse"):
        raise RecipeError(
            f"only: 'baseline', 'control' and 'sparse' are stages that are trained, {only!r} is none"
        )
    _check_trust(recipe, trust)
    _check_begun(recipe)
    return _Experiment(recipe, Path(out), data, fresh, download, progress or (lambda event: None), only).run()


def _check_begun(recipe: Recipe) -> None:
    """What other runs must have made is there, all of it, before hours are spent."""
    for key, (path, run) in runs_of(recipe).items():
        if not Path(path).exists():
            of = f" by {' or '.join(recipe.continues)}" if recipe.continues else ""
            raise DataError(f"model.{key}: there is no {path}; it is made{of} with `--out runs/{run}`")


_READ_FILES = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
"""Arguments by which timm unpickles a file."""


def _check_trust(recipe: Recipe, trust: bool) -> None:
    """A recipe from elsewhere must not run code: neither an attribute of a module, nor a pickle
    that timm opens."""
    name, args = recipe.model.name, recipe.model.args
    code = ":" in name and name.partition(":")[0] not in ("timm", "torchvision")
    if not trust and (code or not _READ_FILES.isdisjoint(args)):
        what = (
            f"model.name: {name} is Python code"
            if code
            else f"model.args: {', '.join(args)} name files of code"
        )
        raise RecipeError(
            f"{recipe.name}: {what}; where you trust the recipe: --trust, or reproduce(..., trust=True)"
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@dataclass
class _Stages:
    """What the stages made: models, what identifies them, and how their training went, by stage."""

    models: dict[str, nn.Module] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)

    def add(self, stage: str, model: nn.Module, key: str, history: Any = None) -> None:
        self.models[stage], self.keys[stage] = model, key
        if history is not None:
            self.history[stage] = history


class _Experiment:
    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        data: str | os.PathLike[str] | None,
        fresh: bool,
        download: bool,
        progress: Progress,
        only: str | None,
    ) -> None:
        self.recipe = recipe
        self.only = only
        self.out = out
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.resumed: list[str] = []
        try:
            if fresh and (out / "stages").is_dir():
                shutil.rmtree(out / "stages")
            (out / "stages").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot use the folder {out}: {error.strerror or error}") from error
        self._lock()
        d = recipe.data
        shape: dict[str, Any] = {
            "image_size": d.image_size,
            "mean": d.mean,
            "std": d.std,
            "download": download,
        }
        everything = resolve(d.name, "train", folder=data, limit=d.limit, **shape)
        self.test = resolve(d.test or d.name, "test", folder=data, limit=d.test_limit, **shape)
        if everything.name != self.test.name and d.test is None:
            raise DataError(
                f"training images are {everything.source}, test images {self.test.source}: one is missing"
            )
        validation, passes = d.validation, 1
        if everything.name == "digits" and d.name != "digits":
            # a small set stands in: a fifth of it validates, and an epoch passes over the rest ten times
            validation, passes = min(validation, len(everything) // 5), _STAND_IN_PASSES
        if validation >= len(everything):
            raise RecipeError(
                f"data.validation: {d.validation} images are to be set aside, but "
                f"{everything.source} has only {len(everything)}"
            )
        self.train, self.val = split(everything, validation, recipe.seed)
        if passes > 1:
            self.train = self.train.take(np.tile(np.arange(len(self.train)), passes))
        for part in (self.train, self.test):
            if part.labels.min() < 0:
                raise DataError(f"{part.source} has no labels, which an experiment needs")

    def _lock(self) -> None:
        """Two runs in one folder would write over each other: the second is refused (a killed run
        leaves no lock)."""
        try:
            import fcntl
        except ModuleNotFoundError:  # not on this platform: nothing is guarded
            return
        stages = self.out / "stages"
        self._lock_files = [(stages / ".lock").open("w")]
        try:
            fcntl.flock(self._lock_files[0], (fcntl.LOCK_SH if self.only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if self.only:
                self._lock_files.append((stages / f".lock.{self.only}").open("w"))
                fcntl.flock(self._lock_files[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another run is at work in {self.out}; choose another --out") from error
        if self.only:
            return  # another stage may be about to write
        kinds = ("results.json", "report.html", "*.safetensors", "*.thresholds.json", "*.quant.json")
        for left in (
            *(self.out / "stages").rglob(".*.tmp"),
            *(f for kind in kinds for f in self.out.glob(f".{kind}.*.tmp")),
        ):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)

    # -- stages

    def _key(self, *parts: Any) -> str:
        """Changes when anything changes that decides a stage's result."""
        described = [
            SCHEMA,
            self.recipe.seed,
            {
                k: v
                for k, v in self.recipe.model.model_dump(exclude={"control"}).items()
                if k not in ("teacher", "thresholds") or v is not None  # as before there were such
            },
            self.recipe.data.model_dump(),
            [
                [i.name, i.source, list(i.images.shape), list(i.mean), list(i.std)]
                for i in (self.train, self.test)
            ],
            torch.__version__,
            torch.get_num_threads(),
            *parts,
        ]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()

    def _once(self, stage: str, key: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """``make(folder)``'s result, or the one of an earlier run with the same ``key``."""
        folder = self.out / "stages" / stage
        done = folder / "result.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(done.read_text(encoding="utf-8"))
            if kept["key"] == key:
                self.seconds[stage] = kept["seconds"]
                self.resumed.append(stage)
                self.progress({"stage": stage, "kind": "cached"})
                return dict(kept["result"])
        mark = folder / "key"
        with contextlib.suppress(OSError):
            if mark.read_text(encoding="utf-8") != key:
                shutil.rmtree(folder)
        if (folder / "last.pt").exists():
            self.resumed.append(stage)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(mark, key)
        self.progress({"stage": stage, "kind": "start"})
        began = time.perf_counter()
        result: dict[str, Any] = _plain(make(folder))
        self.seconds[stage] = round(time.perf_counter() - began, 3)
        write_text(done, json.dumps({"key": key, "seconds": self.seconds[stage], "result": result}))
        self.progress({"stage": stage, "kind": "done", "seconds": self.seconds[stage]})
        return result

    def _train(
        self, stage: str, start: nn.Module, config: SparsifyConfig, key: str, teacher: nn.Module | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        d = self.recipe.data

        def make(folder: Path) -> dict[str, Any]:
            trained = sparsify(
                start,
                Loader(
                    self.train,
                    d.batch_size,
                    seed=self.recipe.seed,
                    shuffle=True,
                    augment=d.augment,
                    channels_last=config.channels_last,
                ),
                Loader(self.val, d.eval_batch_size, channels_last=config.channels_last),
                config,
                checkpoint_dir=folder,
                progress=lambda event: self.progress({"stage": stage, **event}),
                teacher=teacher,
            )
            result = sparsify_result(trained).as_dict()
            self._save(stage, trained)
            return dict(result)

        return self._kept(stage, key, make)

    def _kept(
        self, stage: str, key: str, make: Callable[[Path], dict[str, Any]]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A stage that ends in a network: read from its files, whether ``make`` has just written
        them or an earlier run."""
        files = self.out / f"{stage}.safetensors", self.out / f"{stage}.thresholds.json"
        if not all(f.exists() for f in files):  # a result without its weights is no result
            (self.out / "stages" / stage / "result.json").unlink(missing_ok=True)
        result = self._once(stage, key, make)
        model = self._model()
        if stage == "thresholded":  # the repair gives a bias to layers that had none
            own = model.state_dict()
            with contextlib.suppress(SafetensorError, OSError):  # load_weights says what is wrong
                more = {name: v for name, v in load_file(files[0]).items() if name not in own}
                put_parameters(model, more)
        load_weights(model, files[0].resolve())
        values = load_thresholds(files[1])
        if values:
            set_thresholds(model, values)
        return model.eval(), result

    def _save(self, stage: str, model: nn.Module) -> None:
        """Weights and thresholds of ``model``, as the files of ``stage``."""
        kept = {n: t.tolist() if isinstance(t, torch.Tensor) else t for n, t in get_thresholds(model).items()}
        write_text(self.out / f"{stage}.thresholds.json", json.dumps(kept))
        about = {"stage": stage, "recipe": self.recipe.name, "seed": str(self.recipe.seed)}
        save_weights(model, self.out / f"{stage}.safetensors", about)

    def _threshold(
        self, model: nn.Module, part: ThresholdsPart, key: str
    ) -> tuple[nn.Module, dict[str, Any]]:
        """``model`` with calibrated thresholds, as the stage ``thresholded``; the network given
        stays as it is."""

        def make(folder: Path) -> dict[str, Any]:
            made = copy.deepcopy(model)
            images = Loader(self.val.take(slice(0, part.samples)), min(64, part.samples))
            found = calibrate_thresholds(made, images, **part.model_dump(), seed=self.recipe.seed)
            found.apply(made)
            self._save("thresholded", made)
            left_out = ("thresholds", "tried", "parameters")
            return {k: v for k, v in asdict(found).items() if k not in left_out}

        return self._kept("thresholded", key, make)

    def _model(self) -> nn.Module:
        torch.manual_seed(self.recipe.seed)
        m = self.recipe.model
        return resolve_model(m.name, **m.args)

    def _test_loader(self, limit: int | None = None) -> Loader:
        images = self.test if limit is None else self.test.take(slice(0, limit))
        return Loader(images, self.recipe.data.eval_batch_size)

    def _measured(self, stage: str, model: nn.Module, key: str) -> dict[str, Any]:
        return self._once(f"{stage}.test", key, lambda folder: measure(model, self._test_loader()).as_dict())

    # -- the whole

    def run(self) -> dict[str, Any]:
        r = self.recipe
        began = time.time()
        made = self._trained()
        if self.only is not None:
            return {}
        calibrated: dict[str, Any] | None = None
        if r.thresholds is not None:
            before = _last(made.models)
            key = self._key(made.keys[before], r.thresholds.identity())
            model, calibrated = self._threshold(made.models[before], r.thresholds, key)
            made.add("thresholded", model, key)
        if r.model.control is not None:
            control = self._model().eval()
            load_weights(control, r.model.control)
            made.add("control", control, self._key("given control", r.model.control))
        measured = {n: self._measured(n, model, made.keys[n]) for n, model in made.models.items()}
        stages = [_row(stage, m) for stage, m in measured.items()]
        trained: dict[str, Any] = {}
        codings = self._quantize_and_encode(made.models, made.keys, stages, trained)
        reference = measured.get("control", measured["baseline"])
        for row in stages:
            row["speedup_over_control"] = reference["effective_macs"] / max(1.0, row["effective_macs"])
        results: dict[str, Any] = {
            **self._head(),
            "stages": stages,
            "layers": {s: m["densities"] for s, m in measured.items()},
            "coding": codings,
            "targets": _targets(r, measured, codings, stages),
            "history": _without_times(made.history),
            **({"thresholds": calibrated} if calibrated is not None else {}),
            "quantized_training": {
                n: [{k: v for k, v in e.items() if k != "seconds"} for e in t["epochs"]]
                for n, t in trained.items()
            },
            "run": {
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": self.seconds,
                "wall_seconds": round(time.time() - began, 3),
                "resumed": self.resumed,
            },
        }
        write_text(self.out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        example, _ = next(iter(Loader(self.test.take(slice(0, 1)), 1)))
        write_text(self.out / "report.html", render(results, made.models, example))
        return results

    def _trained(self) -> _Stages:
        """The baseline, and what the recipe makes sparse of it."""
        r, made = self.recipe, _Stages()
        start = self._model()
        if r.model.weights is not None:
            load_weights(start, r.model.weights)
        if r.model.thresholds is not None:
            set_thresholds(start, load_thresholds(r.model.thresholds))
        if r.train is not None:
            config = r.train.config(r.seed, alpha=0.0)  # type: ignore[attr-defined]
            key = self._key("baseline", config.identity())
            model, history = self._train("baseline", start, config, key)
            made.add("baseline", model, key, history)
        else:
            made.add("baseline", start.eval(), self._key("given"))
            self._save("baseline", start)
        if r.sparsify is not None:
            self._sparsify(r.sparsify, made)
        elif self.only not in (None, "baseline"):
            raise RecipeError(f"only: the recipe does not sparsify, there is no {self.only!r}")
        return made

    def _sparsify(self, part: Any, made: _Stages) -> None:
        r = self.recipe
        configs = {"sparse": part.config(r.seed)}
        if part.control:
            configs = {"control": _control(part, r.seed), **configs}
        if self.only not in (None, "baseline", *configs):
            raise RecipeError(f"only: the recipe trains no {self.only!r}")
        teacher: nn.Module | None = None
        if r.model.teacher is not None:
            teacher = self._model().eval()
            load_weights(teacher, r.model.teacher)
        for stage, config in configs.items():
            if self.only in (None, stage):
                key = self._key(made.keys["baseline"], stage, config.identity())
                model, history = self._train(stage, made.models["baseline"], config, key, teacher)
                made.add(stage, model, key, history)

    def _head(self) -> dict[str, Any]:
        """The first entries of the results: what was run, on what, where."""
        r = self.recipe
        return {
            "schema": SCHEMA,
            "name": r.name,
            "about": r.about,
            "seed": r.seed,
            "recipe": r.model_dump(mode="json", exclude_defaults=True),
            "data": {
                "train": _described(self.train),
                "validation": _described(self.val),
                "test": _described(self.test),
            },
            "environment": {
                **cpu.info(),
                "torch_threads": torch.get_num_threads(),
                "torch_bfloat16": has_bfloat16("cpu"),
            },
        }

    def _quantize_and_encode(
        self,
        models: dict[str, nn.Module],
        keys: dict[str, str],
        stages: list[dict[str, Any]],
        trained: dict[str, Any],
    ) -> list[dict[str, Any]]:
        r = self.recipe
        if r.quantize is None:
            return []
        part = r.quantize
        codings: list[dict[str, Any]] = []
        calibration = [
            x for x, _ in Loader(self.val.take(slice(0, part.calibration)), min(250, part.calibration))
        ]  # validation images: training does not see them, nor does the test see these
        last = _last(models)
        chosen = (
            ["control", last] if "control" in models and part.control and r.model.control is None else [last]
        )
        for stage in chosen:
            for bits in part.bits:
                name = f"{stage}.{bits}"
                low = (
                    part.train
                    if part.train is not None and stage == last and bits in part.train.bits
                    else None
                )
                quantized = quantize(
                    models[stage],
                    calibration,
                    bits=bits,
                    per=part.per,
                    observer=part.observer if low is None else low.observer,
                    percentile=part.percentile,
                )
                key = self._key(keys[stage], part.model_dump(exclude={"train", "control"}), bits)
                if low is not None:
                    key = self._key(key, low.identity())
                    trained[name] = self._train_low(name, quantized, models[stage], low, key)
                save_quantization(quantized, self.out / f"{name}.quant.json")
                m = self._measured(name, quantized, key)
                row = _row(stage, m, bits)
                row["trained"] = low is not None
                stages.append(row)
                if r.encode is not None:
                    coding = self._encoded(name, quantized, key)
                    row["bits_per_element"] = coding["bits_per_element"]
                    row["gain_float32"] = coding["gain_float32"]
                    row["decoded_accuracy"] = coding["accuracy"]
                    codings.append({"stage": stage, **coding})
        return codings

    def _train_low(
        self, name: str, quantized: nn.Module, teacher: nn.Module, part: LowBitsPart, key: str
    ) -> dict[str, Any]:
        """Trains ``quantized`` in place; its weights and scales are ``NAME.safetensors`` and
        ``NAME.json``."""
        stem = self.out / name
        done = self.out / "stages" / f"{name}.train" / "result.json"
        if not stem.with_name(f"{name}.safetensors").exists() or not stem.with_name(f"{name}.json").exists():
            done.unlink(missing_ok=True)

        def make(folder: Path) -> dict[str, Any]:
            figures = self._finetuned(f"{name}.train", quantized, teacher, part, folder / "last.pt")
            save_quantized(quantized, stem)
            return {"epochs": figures}

        result = self._once(f"{name}.train", key, make)
        load_quantized(quantized, stem)
        quantized.eval()
        return result

    def _finetuned(
        self, stage: str, quantized: nn.Module, teacher: nn.Module, part: LowBitsPart, checkpoint: Path
    ) -> list[dict[str, float]]:
        """The figures of each epoch."""
        d = self.recipe.data
        quantized.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batches = Loader(
            self.train,
            d.batch_size,
            seed=self.recipe.seed,
            shuffle=True,
            augment=d.augment,
            drop_last=len(self.train) > d.batch_size,
            channels_last=True,
        )
        torch.manual_seed(self.recipe.seed)
        with RatePenalty(quantized, part.rate, part.rate_share) as penalty:
            told = _Told(self.progress, stage, part, penalty)
            return finetune(
                quantized,
                batches,
                epochs=part.epochs,
                lr=part.lr,
                scale_lr=part.scale_lr,
                weight_decay=part.weight_decay,
                penalty=told.cost if part.rate > 0 else None,
                teacher=teacher if part.distill > 0 else None,
                distill=part.distill,
                temperature=part.temperature,
                clip=part.clip,
                mixup=part.mixup,
                precision=part.precision,
                freeze_norm=part.freeze_norm,
                checkpoint=checkpoint,
                on_epoch=told.epoch,
                on_step=told.step,
            )

    def _encoded(self, name: str, quantized: nn.Module, key: str) -> dict[str, Any]:
        part = self.recipe.encode
        assert part is not None
        images = min(part.images, len(self.test))

        def make(folder: Path) -> dict[str, Any]:
            done = 0

            def on_batch(n: int) -> None:
                nonlocal done
                done += n
                self.progress({"stage": f"{name}.coded", "kind": "images", "done": done, "total": images})

            batch = min(self.recipe.data.eval_batch_size, 100 * part.images_per_blob)
            loader = Loader(self.test.take(slice(0, images)), batch)
            coding = code_maps(
                quantized, loader, part.codecs, images_per_blob=part.images_per_blob, on_batch=on_batch
            )
            return asdict(coding)

        return self._once(f"{name}.coded", self._key(key, part.model_dump(), images), make)


@dataclass
class _Told:
    """What the training of a low-bit network tells of its epochs and steps, with the penalty's rate."""

    progress: Callable[[dict[str, Any]], object]
    stage: str
    part: LowBitsPart
    penalty: RatePenalty
    rates: list[float] = field(default_factory=list)

    def cost(self) -> torch.Tensor:
        value = self.penalty()
        self.rates.append(self.penalty.rate)
        return value

    def epoch(self, epoch: int, row: dict[str, float]) -> None:
        row["rate"] = sum(self.rates) / max(1, len(self.rates))
        self.rates.clear()
        left = row["seconds"] * (self.part.epochs - epoch)
        about = {"epoch": epoch, "epochs": self.part.epochs, "seconds_left": left}
        self.progress({"stage": self.stage, "kind": "low_bits_epoch", **about, **row})

    def step(self, event: dict[str, Any]) -> None:
        about = {"stage": self.stage, "kind": "step", "penalty": self.penalty.rate * self.part.rate}
        accuracy = {"accuracy": None, "training_accuracy": event["accuracy"]}
        self.progress({**about, **event, **accuracy})


def _control(part: Any, seed: int) -> SparsifyConfig:
    """The training without the penalty. Nothing of the penalty is in it, so that its result holds for any."""
    default = SparsifyConfig()
    plain = {n: getattr(default, n) for n in PENALTY_FIELDS - {"distill", "temperature"}}
    config: SparsifyConfig = part.config(seed, **{**plain, "alpha": 0.0})
    return config


def _row(stage: str, measured: Mapping[str, Any], bits: int = 32) -> dict[str, Any]:
    return {"stage": stage, "bits": bits, **{k: v for k, v in measured.items() if k != "densities"}}


def _last(models: Mapping[str, Any]) -> str:
    """The last of the stages that a network goes through."""
    return next(s for s in ("thresholded", "sparse", "baseline") if s in models)


def _described(images: Images) -> dict[str, Any]:
    return {"name": images.name, "source": images.source, "images": len(images), "shape": list(images.shape)}


def _without_times(history: dict[str, Any]) -> dict[str, Any]:
    return {
        stage: {**h, "history": [{k: v for k, v in e.items() if k != "seconds"} for e in h["history"]]}
        for stage, h in history.items()
    }


def _targets(
    r: Recipe, measured: dict[str, Any], codings: list[dict[str, Any]], stages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each target of the recipe beside what was measured; None where there is nothing to compare."""
    last = _last(measured)
    base, control, sparse = measured["baseline"], measured.get("control"), measured[last]
    found: dict[str, float | None] = {}
    if last != "baseline":
        found["density_reduction"] = base["density"] / max(1e-12, sparse["density"])
        if control is not None:
            found["speedup_over_control"] = control["effective_macs"] / max(1.0, sparse["effective_macs"])
            # whole test images, so that no rounding error decides
            right = [round(m["accuracy"] * m["samples"]) for m in (sparse, control)]
            found["accuracy_over_control"] = 100 * (right[0] - right[1]) / sparse["samples"]
    for c in codings:
        if c["stage"] == last:
            found[f"gain_{c['bits']}"] = max(c["gain_float32"].values())
    for row in stages:
        if control is not None and row["stage"] == last and row["bits"] != 32:
            right = [round(m["accuracy"] * m["samples"]) for m in (row, control)]
            found[f"accuracy_{row['bits']}_over_control"] = 100 * (right[0] - right[1]) / row["samples"]
    return [
        {
            "target": name,
            "required": required,
            "measured": value,
            "met": value is not None and value >= required,
        }
        for name, required in r.targets.model_dump().items()
        if required is not None
        for value in [found.get(name)]
    ]
