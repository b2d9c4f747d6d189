"""Modules that torch.export cannot capture, such as detectors: their submodules run on the engine."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import ActzipWarning, InputError, UnsupportedError
from actzip.runtime.torch_modules import ModuleOfParts


class Proposals:
    """What no example may hold, as ``torchvision``'s lists of images."""

    def __init__(self, images: torch.Tensor) -> None:
        self.tensors = images


class Stage(nn.Module):
    """Takes an object beside tensors: only what is in it can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def forward(self, found: Proposals, maps: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        assert found.tensors.ndim == 4
        return [self.head(m) for m in maps.values()]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.a(x)
        return {"fine": a, "coarse": self.b(a)}


class Detector(nn.Module):
    """As many boxes as there are high scores, each looked at once more."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.stage = Body(), Stage()
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))])

    def forward(self, images: list[torch.Tensor], least: float = -9.0) -> dict[str, Any]:
        x = torch.stack(images)
        maps = self.body(x)
        scores = self.stage(Proposals(x), maps)[1][:, 0]
        at = (scores > least).nonzero()
        if len(at) > 50:
            at = at[scores[tuple(at.T)].argsort(descending=True)[:50]]
        found = maps["coarse"][at[:, 0], :, at[:, 1], at[:, 2]]
        return {"boxes": self.heads[0](found), "at": at}


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector()


def agree(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=0, atol=1e-5)


def test_a_detector_runs_by_its_submodules(detector: Detector, capfd: pytest.CaptureFixture[str]) -> None:
    before = copy.deepcopy(detector.state_dict())
    images = [torch.rand(3, 24, 32), torch.rand(3, 24, 32)]
    with pytest.warns(ActzipWarning, match=r"3 submodules run on the engine \(body, stage.head, heads.0\)"):
        fast = actzip.compile(detector, (images,), tune=False, cache=False)
    assert isinstance(fast, ModuleOfParts) and "def forward" not in "".join(capfd.readouterr())
    assert detector.training and "forward" not in detector.body.__dict__  # the user's own stays as it was
    detector.eval()
    for size, least in (((24, 32), 0.0), ((40, 16), -0.01), ((24, 32), 1e6)):  # the last: no box at all
        images = [torch.rand(3, *size) for _ in range(3)]
        with torch.no_grad():
            agree(fast(images, least), detector(images, least))
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    arrays = fast([i.numpy() for i in images])
    assert isinstance(arrays["boxes"], np.ndarray)


def test_it_explains_itself_and_says_what_can_be_saved(detector: Detector) -> None:
    images = [torch.rand(3, 24, 32)]
    with pytest.warns(ActzipWarning, match="the rest in PyTorch"):
        fast = actzip.compile(detector, (images,), tune=False, cache=False)
    told = fast.explain((images,))
    assert sum(r.op == "conv2d" for r in told.rows) >= 4 and told.rows[-1].name == "the rest"
    assert told.macs > 24 * 32 * 16 * 27
    with pytest.raises(UnsupportedError, match=r"compile and save a submodule \(body, "):
        fast.save("m.actzip")
    with pytest.raises(InputError, match="the model does not take"):
        fast("no image")


class Undecided(nn.Module):
    """Nothing in it is worth a part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.sum() > 0 else x


def test_where_no_submodule_is_left_the_capture_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="control flow that depends on the numbers in a tensor"):
        actzip.compile(Undecided(), torch.rand(2, 3, 8, 8))
