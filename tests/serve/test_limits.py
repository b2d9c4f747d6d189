"""Limits one by one, without a server."""

from __future__ import annotations

from typing import Any

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


def test_addresses_that_are_none_are_refused_by_the_client() -> None:
    from actzip.errors import InputError
    from actzip.serve import Client

    for url in ("http://host:port", "http://[::1", "http://a:99999", "ftp://a", "host:80", "", None, b"x", 3):
        with pytest.raises(InputError, match="url must be"):
            Client(url)  # type: ignore[arg-type]


def test_a_host_that_is_no_name_is_refused_in_one_line(tail: Any) -> None:
    from actzip.errors import InputError
    from actzip.serve import serve

    for host in ("a" * 300, "\0", "fe80::1%nowhere"):
        with pytest.raises(InputError, match="cannot listen on") as caught:
            serve(tail, host=host, port=0)
        assert "\n" not in str(caught.value)


def test_sizes_that_are_no_numbers_are_refused(tail: Any) -> None:
    from typer.testing import CliRunner

    from actzip.cli import build
    from actzip.errors import InputError

    for size in ("inf", "nan", "-1", "0", "1e300"):
        said = CliRunner().invoke(build(), ["serve", str(tail), "--port", "0", "--max-mb", size])
        assert isinstance(said.exception, InputError) and "--max-mb" in str(said.exception), size


def test_a_wait_that_is_a_date_or_nonsense_is_a_second() -> None:
    from actzip.serve.client import _wait

    assert _wait("3") == 3 and _wait("1e9") == 30
    for text in ("", "Wed, 21 Oct 2026 07:28:00 GMT", "-5", "nan"):
        assert _wait(text) == 1
