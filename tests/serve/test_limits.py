"""Limits one by one, without a server."""

from __future__ import annotations

import pytest

from actzip.errors import InputError
from actzip.serve import Settings


def test_rate_is_a_bucket_for_each_address() -> None:
    pytest.importorskip("fastapi")
    from actzip.serve.limits import Rate

    now = [0.0]
    rate = Rate(2.0, lambda: now[0])
    assert [rate.wait("a") for _ in range(2)] == [0.0, 0.0]
    assert rate.wait("a") == pytest.approx(0.5)
    assert rate.wait("b") == 0.0
    now[0] = 0.5
    assert rate.wait("a") == 0.0 and rate.wait("a") > 0
    now[0] = 100.0
    assert [rate.wait("a") > 0 for _ in range(4)] == [False, False, True, True]
    assert Rate(0.0).wait("a") == 0.0


def test_a_rate_below_one_lets_one_through() -> None:
    pytest.importorskip("fastapi")
    from actzip.serve.limits import Rate

    now = [0.0]
    rate = Rate(0.1, lambda: now[0])
    assert rate.wait("a") == 0.0 and rate.wait("a") == pytest.approx(10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"threads": 0},
        {"queue": -1},
        {"max_bytes": 0},
        {"max_batch": 0},
        {"rate": -1},
        {"rate": float("nan")},
        {"seconds": 0},
        {"body_seconds": float("inf")},
        {"grace_seconds": "1"},
    ],
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        Settings(**wrong)  # type: ignore[arg-type]


def test_an_unknown_setting_is_an_input_error() -> None:
    from actzip.serve import serve

    with pytest.raises(InputError, match="quueue"):
        serve("x.actzip", quueue=3)


def test_numbers_that_json_lacks_are_null() -> None:
    import json

    import numpy as np

    from actzip.serve.wire import answer

    got = json.loads(answer({"y": np.array([[1.5, np.nan], [np.inf, 2]], np.float32)}, True))
    assert got == {"y": {"shape": [2, 2], "data": [[1.5, None], [None, 2.0]]}}
    with pytest.raises(InputError, match="too many for JSON"):
        answer({"y": np.zeros(100_001)}, True)
