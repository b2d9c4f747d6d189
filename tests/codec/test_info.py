"""What a blob says of itself."""

from __future__ import annotations

import pickle

import numpy as np

from actzip.codec import chunks, encode, inspect


def test_info_and_chunks_pickled_by_version_0_1_load() -> None:
    blob = encode(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), "seg")
    for value in (inspect(blob), chunks(blob)[0]):
        now = pickle.dumps(value, protocol=2)  # which names classes in lines of text
        then = now.replace(b"cactzip.codec.info\n", b"cactzip.codec.container\n")
        assert then != now
        assert pickle.loads(then) == value == pickle.loads(now)
