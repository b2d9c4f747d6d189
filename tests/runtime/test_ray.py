"""A compiled model in ray.data.map_batches, on one machine."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

import actzip  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    paths = os.pathsep.join(p for p in sys.path if p)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        ignore_reinit_error=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


def test_the_example_gives_what_the_model_gives(cluster):
    import ray_batches

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    images = np.random.default_rng(0).random((50, 3, 12, 12), np.float32)
    model = actzip.compile(net, images[:2], threads=1, tune=False, cache=False)
    found = ray_batches.classify(images, model, actors=2, batch=8)
    with torch.no_grad():
        want = net(torch.from_numpy(images)).numpy()
    assert [r["id"] for r in found] == list(range(50))
    assert np.allclose([r["score"] for r in found], want.max(1), atol=1e-5)
    assert [r["label"] for r in found] == want.argmax(1).tolist()
