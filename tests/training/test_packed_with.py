"""Packing beside the rest of PyTorch: random networks, compilers, processes, loaders, profiles, sparsify."""

import copy
import json
import os
import random
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actzip.errors import InputError
from actzip.profile.training import training_memory
from actzip.training import packed_activations


def random_network(seed):
    """A function of a map and parameters: operators, views and in-place changes at random."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    weights = [torch.randn(8, 8, 3, 3, requires_grad=True) for _ in range(3)]
    scale = torch.randn(8, requires_grad=True)
    plan = [rng.randrange(20) for _ in range(rng.randrange(3, 10))]

    def run(x):
        kept = [x * scale.view(1, 8, 1, 1)]
        for i in plan:
            y = kept[-1]
            steps = [
                lambda y: F.conv2d(y, weights[0], padding=1),
                lambda y: F.conv2d(F.relu(y), weights[1], padding=1) + y,
                lambda y: F.relu(y),
                lambda y: (y * 1).relu_(),
                lambda y: F.relu6(y * 1, inplace=True),
                lambda y: F.hardtanh(y, -0.5, 0.5),
                lambda y: F.leaky_relu(y * 1, 0.2, inplace=True),
                lambda y: F.batch_norm(y, None, None, scale, scale, training=True),
                lambda y: F.interpolate(F.max_pool2d(F.relu(y), 3, 2, 1), size=y.shape[-2:]),
                lambda y: F.interpolate(F.avg_pool2d(y, 2), size=y.shape[-2:]),
                lambda y: y.clamp(min=0),
                lambda y: torch.clamp(y, -1, 2),
                lambda y: F.threshold(y, 0.1, 0),
                lambda y: F.dropout(y, 0.5),
                lambda y: y.transpose(2, 3).relu().transpose(2, 3) * y,
                lambda y: torch.cat([y[:, :4].relu(), y[:, 4:].sigmoid()], 1),
                lambda y: (y * 1).add_(kept[0]).mul_(0.5),
                lambda y: y.to(memory_format=torch.channels_last),
                lambda y: F.conv2d(y.relu().flatten(2).view_as(y), weights[2], padding=1),
                lambda y: y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1)),
            ]
            y = steps[i](y)
            kept.append(y / (1 + y.detach().abs().amax()))
        return sum(k.square().mean() for k in kept)

    return run, [*weights, scale]


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_are_exact(seed):
    run, parameters = random_network(seed)
    found = []
    for packing in (False, True):
        torch.manual_seed(seed)
        x = torch.randn(2, 8, 16, 16)
        if packing:
            with packed_activations(nn.Identity(), min_bytes=0):
                loss = run(x)
        else:
            loss = run(x)
        found.append((loss, *torch.autograd.grad(loss, parameters, allow_unused=True)))
    assert all(a is b or torch.equal(a, b) for a, b in zip(*found))


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3600, 5),
    )


def test_a_compiled_model_inside_the_context():
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 3, 32, 32)
    found = []
    for packing in (False, True):
        model.zero_grad()
        if packing:
            with packed_activations(compiled) as packed:
                loss = compiled(x).square().sum()
            assert 0 < packed.packed_bytes < packed.saved_bytes
        else:
            loss = compiled(x).square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_two_processes_of_ddp(tmp_path):
    """Gradients of DDP over gloo equal those without packing, bit for bit, in both processes."""
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from actzip.training import packed_activations
        rank, port = int(sys.argv[1]), sys.argv[2]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        torch.manual_seed(0)
        net = DistributedDataParallel(nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3), nn.ReLU()))
        torch.manual_seed(rank)
        x = torch.randn(4, 3, 32, 32)
        found = []
        for packing in (False, True):
            net.zero_grad()
            if packing:
                with packed_activations(net) as packed:
                    loss = net(x).square().mean()
                assert packed.packed_bytes < packed.saved_bytes
            else:
                loss = net(x).square().mean()
            loss.backward()
            found.append([p.grad.clone() for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found))
        dist.destroy_process_group()
        print("same")
        """)
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(port)],
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for rank in range(2)
    ]
    assert [r.communicate(timeout=120)[0].strip() for r in runs] == ["same", "same"]


class _Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.full((3, 32, 32), float(i)), i % 5


def test_loader_workers_beside_packing():
    """Workers fork while the pool of threads is there."""
    model = small()
    loader = torch.utils.data.DataLoader(_Images(), batch_size=4, num_workers=1)
    for _ in range(2):
        for x, y in loader:
            with packed_activations(model):
                loss = F.cross_entropy(model(x), y)
            loss.backward()


def test_sparsify_with_packed_memory_is_the_same():
    from actzip.sparsify import sparsify

    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 32, 32), torch.randint(0, 5, (8,))) for _ in range(3)]
    settings = {"epochs": 1, "alpha": 0.1, "lr": 0.01, "seed": 1}
    found = [
        sparsify(copy.deepcopy(small()), data, data, {**settings, "memory": memory})
        for memory in ("plain", "exact")
    ]
    for a, b in zip(*(m.state_dict().values() for m in found)):
        assert torch.equal(a, b)
    sparsify(small(), data, data, {**settings, "memory": 8})
    with pytest.raises(InputError, match="memory must be plain, exact, 8 or 4"):
        sparsify(small(), data, data, {**settings, "memory": 3})


def test_training_memory_of_a_model():
    model = small()
    before = copy.deepcopy(model.state_dict())
    memory = training_memory(model, torch.randn(8, 3, 32, 32), torch.arange(8) % 5)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert memory.total.saved == sum(layer.saved for layer in memory.layers)
    assert memory.total.exact == sum(layer.exact for layer in memory.layers)
    assert memory.total.bits4 < memory.total.bits8 < memory.total.exact < memory.total.saved
    assert {layer.name for layer in memory.layers} >= {"1", "2", "3"}  # BatchNorm, ReLU, the pool
    assert memory.peaks["bits8"] < memory.peaks["plain"]
    json.dumps(memory.to_dict())
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(InputError, match="saves nothing"):
        training_memory(model, torch.randn(8, 3, 32, 32))


def test_profile_training_on_the_command_line(capsys):
    from actzip.cli import main

    with pytest.raises(SystemExit) as done:
        main(["profile", "lenet5", "--training", "--batch", "16", "--json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 16
    assert 0 < found["total"]["exact"] < found["total"]["saved"]
