"""Two processes under gloo give the penalty, its statistics and the gradients of one with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import loader, net

from actzip.sparsify import ActivationPenalty, sparsify, sparsify_result

pytest.importorskip("accelerate")
HERE = Path(__file__).parent


def run_two(script: str, *args: str) -> list[dict]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = [str(HERE), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    processes = []
    for rank in (0, 1):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join(path),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *args],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [p.communicate(timeout=240) for p in processes]
    for p, (_, error) in zip(processes, outputs):
        assert p.returncode == 0, error[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]


#: How a script ends. Gloo's threads are torn down with the interpreter, where they may abort
#: ("terminate called without an active exception", seen on a busy machine): both leave together and
#: without that.
LEAVE = """
import os, torch.distributed
sys.stdout.flush()
torch.distributed.barrier()
os._exit(0)
"""

PENALTY = (
    """
import json, sys, torch, torch.distributed as dist
from toys import net, loader
from actzip.sparsify import ActivationPenalty
dist.init_process_group("gloo")
rank = dist.get_rank()
kind = sys.argv[1]
model = net(norm=False)
x, y = next(iter(loader()))
penalty = ActivationPenalty(model, kind, alpha=1.5, example=x[:2], stats_every=1)
ddp = torch.nn.parallel.DistributedDataParallel(model)
mine = x[rank * 16 : rank * 16 + 16]
for _ in range(3):
    out = ddp(mine)
    value = penalty() + 0.0 * out.sum()
    ddp.zero_grad()
    value.backward()
both = value.detach().clone()
dist.all_reduce(both)
grads = {n: p.grad.flatten().tolist() for n, p in model.named_parameters() if p.grad is not None}
print(json.dumps({"value": float(both) / 2, "densities": penalty.densities, "grads": grads}))
"""
    + LEAVE
)


@pytest.mark.parametrize("kind", ["tl1", "l1", "hoyer"])
def test_penalty_statistics_and_gradients(kind):
    results = run_two(PENALTY, kind)
    model = net(norm=False)
    x, _ = next(iter(loader()))
    penalty = ActivationPenalty(model, kind, alpha=1.5, example=x[:2], stats_every=1)
    for _ in range(3):
        out = model(x)
        value = penalty() + 0.0 * out.sum()
        model.zero_grad()
        value.backward()
    penalty.detach()
    for r in results:
        assert r["value"] == pytest.approx(float(value.detach()), rel=1e-5)
        assert r["densities"] == pytest.approx(penalty.densities, rel=1e-6)
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(
                    torch.tensor(r["grads"][name]), p.grad.flatten(), rtol=1e-4, atol=1e-6
                )


WHOLE = (
    """
import json, sys, torch
from toys import net, loader
from actzip.sparsify import sparsify, sparsify_result
settings = json.loads(sys.argv[1])
model = sparsify(net(norm=False), loader(), loader(), settings, checkpoint_dir=sys.argv[2])
print(json.dumps({
    "history": sparsify_result(model).as_dict()["history"],
    "weights": {k: v.flatten().tolist() for k, v in model.state_dict().items()},
}))
"""
    + LEAVE
)


def test_the_same_recipe_in_two_processes(tmp_path):
    settings = {"epochs": 2, "lr": 0.05, "alpha": 1.0, "penalty": "l1"}
    results = run_two(WHOLE, json.dumps(settings), str(tmp_path))
    one = sparsify(net(norm=False), loader(), loader(), settings)
    weights = {k: v.flatten().tolist() for k, v in one.state_dict().items()}
    for r in results:
        for key, value in weights.items():
            assert r["weights"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        last = sparsify_result(one).history[-1]
        assert r["history"][-1]["accuracy"] == last.accuracy
        assert r["history"][-1]["density"] == pytest.approx(last.density, rel=1e-2)
    assert (tmp_path / "last.pt").exists()


CALIBRATED = (
    """
import json, sys, torch
from toys import net, loader
from actzip.activations import get_thresholds
from actzip.sparsify import sparsify
settings = json.loads(sys.argv[1])
model = sparsify(net(norm=False), loader(), loader(), settings)
print(json.dumps({n: t.tolist() for n, t in get_thresholds(model).items()}))
"""
    + LEAVE
)


def test_two_processes_calibrate_the_same_thresholds():
    settings = {
        "epochs": 1,
        "alpha": 0,
        "thresholds": "calibrated",
        "threshold_density": 0.4,
        "threshold_samples": 32,
    }
    mine, other = run_two(CALIBRATED, json.dumps(settings))
    assert mine == other and any(max(t) > 0 for t in mine.values())
