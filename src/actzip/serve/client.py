"""The other side: maps go out as blobs, arrays come back."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from actzip.checks import number, whole
from actzip.errors import CodecError, DataError, InputError
from actzip.serve.wire import BINARY, PROTOCOL, body_of

__all__ = ["Client"]

_HEADER = "Actzip-Protocol"
_LONGEST_WAIT = 30.0


class Client:
    """Asks a server of :func:`actzip.serve.serve`. May be used from several threads.

    ``client(x)`` gives the output for the map ``x``, a numpy array or tensor (N, ...), as numpy
    arrays: one, or a dict by name where the model has several. A model of several inputs takes them
    by position or by name.

    Args:
        url: ``http://host:port``.
        codec, bits: how maps are sent, as of :func:`actzip.encode`; ``bits`` None: exactly.
        timeout: seconds for each attempt.
        retries: attempts after a first that met a busy server (503, 429), or lost its connection.

    Raises (a call):
        InputError: maps that the model does not take; too large a request.
        CodecError: the server found the blob damaged, or is of another version.
        DataError: no server, a busy one after all retries, or one that failed.
    """

    def __init__(
        self,
        url: str,
        *,
        codec: str = "rans",
        bits: int | None = None,
        timeout: float = 60.0,
        retries: int = 3,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url must be http://host:port, not {url!r}")
        self.url = url.rstrip("/")
        self._parts = parts
        self._options: dict[str, Any] = {"codec": codec, "bits": bits}
        self._timeout = number(timeout, "timeout", 0, above=True)
        self._tries = 1 + whole(retries, "retries", 0)
        self._local = threading.local()
        self._inputs: list[str] | None = None

    def __call__(self, *maps: Any, **named: Any) -> Any:
        return self.predict(self._body(maps, named))

    def _body(self, maps: tuple[Any, ...], named: Mapping[str, Any]) -> bytes:
        if len(maps) == 1 and not named:
            return body_of(maps[0], **self._options)
        if self._inputs is None:
            self._inputs = [i["name"] for i in self.model()["inputs"]]
        if len(maps) > len(self._inputs):
            raise InputError(f"{len(maps)} maps given; the model takes {len(self._inputs)}")
        return body_of({**dict(zip(self._inputs, maps)), **named}, **self._options)

    def predict(self, body: bytes) -> Any:
        """The outputs for a body made before: a blob, or the bytes of a file of maps."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        content = self._request("POST", "/v1/predict", body)
        try:
            outputs = load(content)
        except SafetensorError as error:
            raise DataError(f"{self.url} gave no safetensors: {error}") from None
        return outputs["output"] if list(outputs) == ["output"] else outputs

    def model(self) -> dict[str, Any]:
        """What the model takes and gives, and the server's limits."""
        return dict(json.loads(self._request("GET", "/v1/model")))

    def close(self) -> None:
        """Closes this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        why: object = None
        for left in reversed(range(self._tries)):
            try:
                status, headers, content = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                why, wait = error, 0.2
            else:
                if status == 200:
                    return content
                if status not in (429, 503):
                    raise self._error(status, content)
                why = self._error(status, content)
                wait = min(_LONGEST_WAIT, float(headers.get("Retry-After") or 1))
            if left:
                time.sleep(wait)
        raise why if isinstance(why, DataError) else DataError(f"{self.url} does not answer: {why}")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        connection = self._connection()
        headers = {"Accept": BINARY, "Content-Type": BINARY, _HEADER: PROTOCOL}
        with suppress(BrokenPipeError, ConnectionResetError):  # the answer may be there already
            connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's."""
        found: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if found is None:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            found = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)
            self._local.connection = found
        return found

    def _error(self, status: int, content: bytes) -> Exception:
        try:
            said = json.loads(content)["detail"]
        except (ValueError, KeyError, TypeError):
            said = content[:200].decode("utf-8", "replace") or "without a word"
        kind = {400: CodecError, 413: InputError, 422: InputError}.get(status, DataError)
        return kind(f"{self.url} answers {status}: {said}")
