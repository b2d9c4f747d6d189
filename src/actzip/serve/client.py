"""The other side: maps go out as blobs, arrays come back."""

from __future__ import annotations

import http.client
import json
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from actzip.checks import number, shown, text, whole
from actzip.errors import CodecError, DataError, InputError, StreamError
from actzip.serve.wire import BINARY, PROTOCOL, STREAM, body_of

if TYPE_CHECKING:
    from actzip.split import Head

__all__ = ["Client", "ClientStream"]

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
        self._parts = _parts(url)
        self.url = url.rstrip("/")
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

    def predict(self, body: bytes, *, stream: str | None = None) -> Any:
        """The outputs for a body made before: a blob, the bytes of a file of maps, or a frame, which
        may be one of a ``stream`` (its name, 16 to 64 letters and digits)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        content = self._request("POST", "/v1/predict", body, {} if stream is None else {STREAM: stream})
        try:
            outputs = load(content)
        except SafetensorError as error:
            raise DataError(f"{self.url} gave no safetensors: {error}") from None
        return outputs["output"] if list(outputs) == ["output"] else outputs

    def stream(self, head: Head, *, key_every: int = 60) -> ClientStream:
        """Video to a served tail: each frame predicted from the one before where that is cheaper.

        Args:
            head: the client's side of the split. key_every: one frame in so many stands by itself.
        """
        return ClientStream(self, head, key_every)

    def model(self) -> dict[str, Any]:
        """What the model takes and gives, and the server's limits."""
        content = self._request("GET", "/v1/model")
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.url} says nothing of a model: {error}") from None

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

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        more: Mapping[str, str] | None = None,
    ) -> bytes:
        why: object = None
        for left in reversed(range(self._tries)):
            try:
                status, headers, content = self._once(method, path, body, more or {})
            except (OSError, http.client.HTTPException) as error:
                self.close()
                why, wait = error, 0.2
            else:
                if status == 200:
                    return content
                if status not in (429, 503):
                    raise self._error(status, content)
                why = self._error(status, content)
                wait = _wait(headers.get("Retry-After", ""))
            if left:
                time.sleep(wait)
        raise why if isinstance(why, DataError) else DataError(f"{self.url} does not answer: {why}")

    def _once(
        self, method: str, path: str, body: bytes | None, more: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        connection = self._connection()
        headers = {"Accept": BINARY, "Content-Type": BINARY, _HEADER: PROTOCOL, **more}
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
        kinds = {400: CodecError, 409: StreamError, 413: InputError, 422: InputError}
        return kinds.get(status, DataError)(f"{self.url} answers {status}: {said}")


def _parts(url: Any) -> SplitResult:
    """The parts of an address.

    Raises:
        InputError: it is none, or its port is no number.
    """
    try:
        parts = urlsplit(text(url, "url"))
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise InputError(f"url must be http://host:port, not {shown(url)}")
    return parts


def _wait(after: str) -> float:
    """Seconds that ``Retry-After`` asks for; 1 where it says a date."""
    try:
        seconds = float(after)
    except ValueError:
        return 1.0
    return min(_LONGEST_WAIT, seconds) if seconds >= 0 else 1.0


class ClientStream:
    """One video of a client: call it with one input after the other. Where the server has lost the
    thread (it forgot the stream, an answer did not arrive) the same input goes again as a key frame."""

    def __init__(self, client: Client, head: Head, key_every: int) -> None:
        self.client, self.head = client, head
        self.name = secrets.token_hex(16)
        self._sender = head.coder.sender(key_every=key_every)

    def __call__(self, x: Any) -> Any:
        """The outputs for the next input (N, C, H, W); errors are those of :class:`Client`."""
        maps = self.head.maps(x)
        try:
            return self.client.predict(self._sender.encode(maps), stream=self.name)
        except StreamError:
            self._sender.key()
            return self.client.predict(self._sender.encode(maps), stream=self.name)
