"""Batch inference over a cluster with Ray Data: python examples/ray_batches.py

The compiled model is made once; ``map_batches`` pickles it with the class's arguments and rebuilds
it in each actor, with the kernels that it was compiled with where that CPU has them. Ray moves the
data, restarts lost workers and scales to the cluster; ``ray.init()`` without an address is one
machine. Needs ``pip install actzip[ray]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import actzip


class Predict:
    """One actor: a compiled model, one thread; Ray runs as many actors as there are CPUs to use."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        scores = self.model(np.ascontiguousarray(batch["image"], np.float32))
        return {"id": batch["id"], "label": scores.argmax(1), "score": scores.max(1)}


def classify(
    images: np.ndarray[Any, Any], model: Any, *, actors: int = 2, batch: int = 16
) -> list[dict[str, Any]]:
    """``images`` (N, C, H, W) through ``model`` (of :func:`actzip.compile`, ``threads=1``) in
    ``actors`` processes."""
    import ray

    rows = ray.data.from_items([{"id": i, "image": image} for i, image in enumerate(images)])
    labels = rows.map_batches(
        Predict,
        fn_constructor_args=(model,),
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=batch,
        batch_format="numpy",
    )
    return sorted(labels.take_all(), key=lambda r: r["id"])


def main() -> None:
    import ray
    import torch

    from actzip.models import resolve

    torch.manual_seed(0)
    images = np.random.default_rng(0).random((100, 3, 32, 32), np.float32)
    model = actzip.compile(resolve("cifar_resnet20").eval(), images[:8], threads=1)
    ray.init(num_cpus=2, include_dashboard=False)
    found = classify(images, model)
    print(
        f"{len(found)} images; the first five:",
        [(r["id"], int(r["label"]), float(r["score"])) for r in found[:5]],
    )


if __name__ == "__main__":
    main()
