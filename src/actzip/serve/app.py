"""The routes: predictions, what the model takes, health, metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from actzip._version import __version__
from actzip.errors import ActzipError
from actzip.serve.limits import Rate, read_body, refused
from actzip.serve.metrics import CONTENT_TYPE, Metrics
from actzip.serve.pool import Pool, Reply
from actzip.serve.settings import Settings
from actzip.serve.streams import Streams
from actzip.serve.wire import BINARY, JSON, PROTOCOL, STREAM
from actzip.serve.worker import ASK_BINARY, ASK_JSON, DONE, IN_STREAM, REFUSED, joined, parted

__all__ = ["make_app"]

_HEADER = "Actzip-Protocol"
_BODY = {
    "requestBody": {
        "required": True,
        "description": "A blob of actzip.encode, or a file of maps (.azm) with one map an input.",
        "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
    }
}
_STATUSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs as safetensors, or as JSON where that is accepted.",
        "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}, JSON: {}},
    },
    400: {"description": "The body is damaged, cut off, foreign, or of another version."},
    408: {"description": "The body did not arrive in time."},
    409: {"description": "A frame of a stream needs one that is not here: send a key frame."},
    413: {"description": "The body is too large."},
    422: {"description": "The maps are not what the model takes: names, shapes, types, batch."},
    429: {"description": "Too many requests from this address; see Retry-After."},
    500: {"description": "The model could not be run on this request."},
    503: {"description": "Too many requests inside; see Retry-After."},
    504: {"description": "The model took too long."},
}


def make_app(pool: Pool, settings: Settings, on_start: Callable[[ActzipError | None], None]) -> FastAPI:
    """The application; ``on_start`` is called when the model is loaded, or with why it is not."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await pool.start()
        except ActzipError as error:
            on_start(error)
        else:
            on_start(None)
        yield
        await pool.close()

    app = FastAPI(
        title="actzip serve",
        version=__version__,
        description="A compiled model on packed feature maps.",
        lifespan=lifespan,
    )
    desk = _Desk(pool, settings)
    app.add_api_route(
        "/v1/predict",
        desk.predict,
        methods=["POST"],
        summary="Run the model on the maps in the body.",
        response_class=Response,
        responses=_STATUSES,
        openapi_extra=_BODY,
    )
    app.add_api_route("/v1/model", desk.about, summary="What the model takes and gives.")
    app.add_api_route("/health", desk.health, summary="200 while a worker is ready, else 503.")
    app.add_api_route("/metrics", desk.metrics, summary="Counters, as Prometheus reads them.")
    return app


class _Desk:
    """The routes' functions, and who is inside."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool, self._settings = pool, settings
        self._rate = Rate(settings.rate)
        self._streams = Streams(settings.streams, settings.stream_seconds)
        self._inside = 0
        self._counts = Metrics(lambda: self._inside, lambda: pool.ready, lambda: len(self._streams))
        pool.on_restart = self._counts.restarts.inc

    async def about(self) -> dict[str, Any]:
        limits = {"max_bytes": self._settings.max_bytes, "max_batch": self._settings.max_batch}
        return {**self._pool.about, **limits, "protocol": PROTOCOL, "version": __version__}

    async def health(self) -> Response:
        ready = self._pool.ready
        state = {"status": "ok" if ready else "no worker is ready", "workers_ready": ready}
        return Response(json.dumps(state), 200 if ready else 503, media_type=JSON)

    async def metrics(self) -> Response:
        return Response(self._counts.text(), headers={"Content-Type": CONTENT_TYPE})

    async def predict(self, request: Request) -> Response:
        """Counts every request by its status."""
        status = 500
        try:
            response = await self._admitted(request)
            status = response.status_code
            self._counts.sent.inc(len(response.body))
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = 499
            return Response(status_code=400)  # nobody reads it
        finally:
            self._counts.requests.labels(str(status)).inc()

    async def _admitted(self, request: Request) -> Response:
        error = self._unwelcome(request)
        if error is not None:
            raise await refused(request, error, self._settings.max_bytes)
        self._inside += 1
        try:
            return await self._accepted(request)
        finally:
            self._inside -= 1

    def _unwelcome(self, request: Request) -> HTTPException | None:
        """Why a request is refused before its body is read."""
        said = request.headers.get(_HEADER, PROTOCOL)
        if said != PROTOCOL:
            return HTTPException(400, f"protocol {said[:20]!r}; this server speaks {PROTOCOL}")
        wait = self._rate.wait(request.client.host if request.client else "")
        if wait:
            return _later(429, f"more than {self._settings.rate:g} requests a second", wait)
        if self._inside >= self._settings.most:
            return _later(503, f"{self._inside} requests are inside already", 1)
        return None

    async def _accepted(self, request: Request) -> Response:
        began = time.perf_counter()
        body = await read_body(request, self._settings.max_bytes, self._settings.body_seconds)
        self._counts.received.inc(len(body))
        as_json = JSON in request.headers.get("accept", "")
        kind = ASK_JSON if as_json else ASK_BINARY
        name = request.headers.get(STREAM)
        reply = await (self._pool.submit(kind, body) if name is None else self._streamed(name, kind, body))
        self._counts.seconds.observe(time.perf_counter() - began)
        return _response(reply, as_json, self._settings.seconds)

    async def _streamed(self, name: str, kind: int, body: bytes) -> Reply:
        """The reply to a stream's next frame. Its state is here, not in a worker: one that dies takes
        nothing with it."""
        with self._streams.frame(name) as stream:
            reply = await self._pool.submit(kind | IN_STREAM, joined(stream.state, body))
            if reply.kind != DONE:
                return reply
            state, content = parted(reply.content)
            stream.state = state if len(state) <= self._settings.max_bytes else b""
            return Reply(DONE, content)


def _later(status: int, why: str, seconds: float) -> HTTPException:
    after = str(max(1, math.ceil(seconds)))
    return HTTPException(status, f"{why}; try again in {after} s", headers={"Retry-After": after})


def _response(reply: Reply, as_json: bool, seconds: float) -> Response:
    """What a worker's reply is in HTTP."""
    if reply.kind is None:
        raise HTTPException(504, f"the model took more than {seconds:g} s")
    if reply.kind == DONE:
        media = JSON if as_json else BINARY
        return Response(reply.content, media_type=media, headers={_HEADER: PROTOCOL})
    said = json.loads(reply.content)
    if reply.kind == REFUSED:
        raise HTTPException({"CodecError": 400, "StreamError": 409}.get(said["type"], 422), said["error"])
    raise HTTPException(500, f"the model could not be run: {said['error']}")
