"""A codec for CompressAI-Vision: feature maps of its split pipelines, coded by ours.

Import this module where CompressAI-Vision is installed, and name the codec ``actzip`` in its
configuration; or give the class to a pipeline yourself. Its contract, as of its codecs' base class:
``encode`` takes a dict whose ``data`` has a tensor a layer and gives ``({"bytes": [one an input],
"bitstream": path}, seconds by stage, None)``; ``decode`` takes the bitstream and gives ``(dict with
data, seconds, None)``. CompressAI-Vision releases before 1.1 give and take the same without the last
item.

``encoder_config``: ``bits`` (1 to 8), ``price`` (of a bit, in the error of sending nothing), ``codec``
(of :func:`actzip.codec.available`), ``per`` (``channel`` or ``map``).
"""

from __future__ import annotations

import importlib
import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actzip._native import _codec
from actzip.errors import CodecError, DataError, InputError
from actzip.files import write_bytes
from actzip.split.coder import MapCoder
from actzip.split.rate import Rates

__all__ = ["ActzipCodec", "register"]

_MAGIC = b"AZCV"


class ActzipCodec(torch.nn.Module):
    """CompressAI-Vision's codec interface. A bitstream holds its own quantizers: header and
    quantizers are counted.

    Args:
        vision_model, dataset: given by the pipelines, not used.
        eval_encode: handed back as ``eval_encode_type``. encoder_config: see the module.
    """

    def __init__(
        self,
        vision_model: Any = None,
        dataset: Any = None,
        *,
        eval_encode: str = "bitrate",
        encoder_config: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        config = dict(encoder_config or {})
        self.bits, self.per = int(config.get("bits", 8)), str(config.get("per", "map"))
        self.codec, self.price = str(config.get("codec", "rans")), float(config.get("price", 2**-10))
        self.eval_encode = eval_encode

    @property
    def qp_value(self) -> float:
        """The price of a bit, which is this codec's quality."""
        return self.price

    @property
    def eval_encode_type(self) -> str:
        """What the evaluation counts."""
        return self.eval_encode

    def encode(
        self,
        input: dict[str, Any],
        codec_output_dir: str = "",
        bitstream_name: str = "",
        file_prefix: str = "",
        remote_inference: bool = False,
        **others: Any,
    ) -> tuple[dict[str, Any], dict[str, float], None]:
        """Codes every map of ``input["data"]`` into one bitstream file.

        Raises:
            InputError: pictures (``remote_inference``) instead of maps. DataError: the file cannot
                be written.
        """
        if remote_inference or not isinstance(input.get("data"), Mapping):
            raise InputError("this codec takes feature maps: a dict of tensors under 'data'")
        start = time.perf_counter()
        maps = {str(k): _array(v) for k, v in input["data"].items()}
        rest = {k: _plain(v) for k, v in input.items() if k != "data"}
        count = {len(m) for m in maps.values()}
        if len(count) != 1:
            raise InputError("the maps are of unlike numbers of inputs")
        coder = MapCoder([self._quantizer(k, m) for k, m in maps.items()], self.codec, most=2**20)
        text = json.dumps({"coder": coder.to_dict(), "rest": rest}).encode()
        header = _MAGIC + struct.pack("<II", len(text), _codec.crc32c(text)) + text
        data = header + coder.encode(list(maps.values()))
        name = f"{bitstream_name or 'actzip'}{'-' + file_prefix if file_prefix else ''}.bin"
        path = write_bytes(Path(codec_output_dir or ".") / name, data)
        inputs = count.pop()
        times = {"actzip": time.perf_counter() - start}
        return {"bytes": [len(data) / inputs] * inputs, "bitstream": str(path)}, times, None

    def _quantizer(self, name: str, maps: Any) -> Any:
        signed = float(maps.min()) < 0
        rates = Rates(name, [maps], bits=max(self.bits, 1 + signed), per=self.per)
        return rates.at(self.price * rates.dropped / rates.elements)[0]

    def decode(
        self,
        input: Any,
        codec_output_dir: str = "",
        file_prefix: str = "",
        org_img_size: Any = None,
        remote_inference: bool = False,
        **others: Any,
    ) -> tuple[dict[str, Any], dict[str, float], None]:
        """The maps of a bitstream file that :meth:`encode` wrote.

        Raises:
            DataError: there is no such file. CodecError: it is damaged or none of ours.
        """
        start = time.perf_counter()
        try:
            data = Path(input).read_bytes()
        except (OSError, TypeError) as error:
            raise DataError(f"cannot read the bitstream {input!r}: {error}") from error
        coder, rest, frame = _opened(data, str(input))
        maps = coder.decode(frame)
        found = {q.name: torch.from_numpy(m) for q, m in zip(coder.quantizers, maps, strict=True)}
        return {**rest, "data": found}, {"actzip": time.perf_counter() - start}, None


def _opened(data: bytes, name: str) -> tuple[MapCoder, dict[str, Any], bytes]:
    if data[:4] != _MAGIC or len(data) < 12:
        raise CodecError(f"{name}, byte 0: no bitstream of this codec: it does not begin with 'AZCV'")
    size, crc = struct.unpack_from("<II", data, 4)
    text = data[12 : 12 + size]
    if len(text) < size or _codec.crc32c(text) != crc:
        raise CodecError(f"{name}, byte 12: the header is cut off or damaged (its checksum differs)")
    try:
        said = json.loads(text)
        return MapCoder.from_dict(said["coder"]), dict(said["rest"]), data[12 + size :]
    except (ValueError, KeyError, TypeError, DataError, RecursionError) as error:
        raise CodecError(f"{name}, byte 12: the header is damaged: {error}") from error


def _array(x: Any) -> Any:
    a = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, np.float32)
    return a[None] if a.ndim == 3 else a


def _plain(value: Any) -> Any:
    """What JSON can say of the dict's other entries (sizes, names); tuples become lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return str(value)


def register(name: str = "actzip") -> None:
    """Puts the codec into CompressAI-Vision's registry.

    Raises:
        DataError: CompressAI-Vision is not installed.
    """
    try:
        registry = importlib.import_module("compressai_vision.registry")
    except ImportError as error:
        raise DataError(
            "CompressAI-Vision is not installed: it comes from its repository, not from the package index"
        ) from error
    registry.register_codec(name)(ActzipCodec)
