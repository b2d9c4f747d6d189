"""The tuning cache survives damage, other versions and read-only folders."""

from __future__ import annotations

import json

import pytest

from actzip.runtime.cache import TuningCache, cache_dir
from crowd import at_once

WHO = {"cpu": "test", "isa": "avx2", "version": "1"}


def test_round_trip_and_merge(tmp_path):
    a, b = TuningCache(WHO, tmp_path), TuningCache(WHO, tmp_path)
    a.put("k1", {"kernel": "x"})
    b.put("k2", {"kernel": "y"})
    assert a.save() and b.save()
    c = TuningCache(WHO, tmp_path)
    assert c.get("k1") == {"kernel": "x"} and c.get("k2") == {"kernel": "y"} and c.get("k3") is None
    assert [p.name for p in tmp_path.iterdir()] == [c.path.name]


def test_another_identity_has_another_file(tmp_path):
    a = TuningCache(WHO, tmp_path)
    a.put("k", {"kernel": "x"})
    a.save()
    other = TuningCache({**WHO, "isa": "avx512"}, tmp_path)
    assert other.path != a.path and other.get("k") is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\x00\xff" * 50,
        b"[]",
        b'{"format": 99}',
        b"[" * 100_000,
        b'{"format": 2, "identity": {}, "entries": {}}',
    ],
)
def test_damage_is_ignored_and_written_anew(tmp_path, damage):
    path = TuningCache(WHO, tmp_path).path
    path.write_bytes(damage)
    cache = TuningCache(WHO, tmp_path)
    assert cache.get("k") is None
    cache.put("k", {"kernel": "x"})
    assert cache.save()
    assert TuningCache(WHO, tmp_path).get("k") == {"kernel": "x"}
    assert json.loads(path.read_text())["identity"] == WHO


def test_bad_entries_do_not_come_out(tmp_path):
    cache = TuningCache(WHO, tmp_path)
    cache.put("k", {"kernel": "x"})
    cache.save()
    data = json.loads(cache.path.read_text())
    data["entries"]["bad"] = 3
    cache.path.write_text(json.dumps(data))
    again = TuningCache(WHO, tmp_path)
    assert again.get("bad") is None and again.get("k") == {"kernel": "x"}


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TuningCache(WHO, tmp_path / "file" / "below")
    cache.put("k", {"kernel": "x"})
    assert not cache.save()
    assert cache.get("k") == {"kernel": "x"}


def test_threads(tmp_path):
    cache = TuningCache(WHO, tmp_path)

    def work(i):
        for j in range(20):
            cache.put(f"{i}-{j}", {"kernel": str(i)})
            cache.save()

    at_once(work, 4)
    again = TuningCache(WHO, tmp_path)
    assert all(again.get(f"{i}-{j}") == {"kernel": str(i)} for i in range(4) for j in range(20))


def test_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ACTZIP_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("ACTZIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir().name == "actzip"
