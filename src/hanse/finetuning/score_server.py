"""Answers inputs over HTTP with the current version: `POST /score`, `GET /health`, `GET /version`, `GET /metrics`.

Requests that come together are scored together, in one thread. Nothing waits to make a batch fuller.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import logging
import math
import signal
import socket
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvicorn
from blake3 import blake3
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hanse.errors import ConfigError, StorageFull
from hanse.finetuning.routing import Pair, Router
from hanse.finetuning.scoring import Answer, Content, Input, Item, Refusal, Scored, as_input
from hanse.finetuning.serving import Records

logger = logging.getLogger(__name__)
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_IMAGE_TYPES = ("image/", "application/octet-stream")
_MIN_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes. body_bytes, rows: of one request. requests, bodies_bytes: at a time; the next is told to come again.

    body_within_s: in which a request's body has to be here. stop_within_s: which requests have to end in when the server stops.
    batch: inputs after which no other request is added to a batch.
    """

    body_bytes: int = 8 << 20
    rows: int = 256
    requests: int = 64
    bodies_bytes: int = 64 << 20
    body_within_s: float = 30.0
    stop_within_s: float = 10.0
    batch: int = 64


Text = Annotated[str, msgspec.Meta(max_length=200)]


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An element of a JSON list. input: an image file in base64, or a row of numbers, in order or by column."""

    input: str | list[float] | dict[str, float]
    name: Text = ""
    slices: dict[Text, Text] = {}
    label: Annotated[int, msgspec.Meta(ge=0, le=1)] | None = None


class Declined(Exception):
    """An answer that says why not."""

    def __init__(self, status: int, error: str, hint: str = "", **headers: str) -> None:
        super().__init__(error)
        self.status, self.error, self.hint = status, error, hint
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(slots=True)
class Metrics:
    """What /metrics says."""

    requests: Counter[int] = field(default_factory=Counter)  # by status
    decisions: Counter[tuple[str, int]] = field(default_factory=Counter)  # by version and decision
    differing: Counter[str] = field(default_factory=Counter)  # by who alone decides positive
    buckets: list[int] = field(default_factory=lambda: [0] * (len(_BUCKETS_S) + 1))
    seconds: float = 0.0
    refused: int = 0
    batches: int = 0
    compared: int = 0

    def request(self, status: int, seconds: float) -> None:
        self.requests[status] += 1
        self.buckets[bisect_left(_BUCKETS_S, seconds)] += 1
        self.seconds += seconds

    def answers(self, answers: Sequence[Answer]) -> None:
        self.batches += 1
        for each in answers:
            if isinstance(each, Scored):
                self.decisions[each.version, each.decision] += 1
            else:
                self.refused += 1

    def pairs(self, pairs: Sequence[Pair]) -> None:
        self.compared += len(pairs)
        for pair in pairs:
            if pair.current_decision != pair.candidate_decision:
                self.differing["current" if pair.current_decision else "candidate"] += 1

    def text(self, router: Router, under_way: int) -> str:
        """Prometheus' text format, 0.0.4."""
        lines: list[str] = []

        def metric(name: str, kind: str, help: str, values: Mapping[str, float]) -> None:
            lines.extend([f"# HELP hanse_{name} {help}", f"# TYPE hanse_{name} {kind}"])
            lines.extend(f"hanse_{name}{labels} {value}" for labels, value in values.items())

        total = sum(self.buckets)
        metric("requests_total", "counter", "Requests to /score.", {f'{{status="{code}"}}': n for code, n in sorted(self.requests.items())})
        metric("requests_under_way", "gauge", "Requests to /score that are not answered yet.", {"": under_way})
        metric(
            "decisions_total",
            "counter",
            "Inputs answered.",
            {f'{{version="{version}",decision="{decision}"}}': n for (version, decision), n in sorted(self.decisions.items())},
        )
        metric("refused_inputs_total", "counter", "Inputs that broke the schema.", {"": self.refused})
        metric("batches_total", "counter", "Batches scored.", {"": self.batches})
        metric("compared_inputs_total", "counter", "Inputs that the candidate scored too.", {"": self.compared})
        metric(
            "disagreements_total",
            "counter",
            "Inputs that only one of the two decides positive.",
            {f'{{positive_for="{who}"}}': self.differing[who] for who in ("current", "candidate")},
        )
        metric("candidate_failures_total", "counter", "Inputs that the candidate failed on.", {"": router.candidate_failures})
        metric("current_version_info", "gauge", "The version that answers.", {f'{{version="{router.current.version}"}}': 1})
        lines.extend(
            ["# HELP hanse_request_seconds Time from a request to its answer.", "# TYPE hanse_request_seconds histogram"]
            + [f'hanse_request_seconds_bucket{{le="{le:g}"}} {sum(self.buckets[: row + 1])}' for row, le in enumerate(_BUCKETS_S)]
            + [f'hanse_request_seconds_bucket{{le="+Inf"}} {total}', f"hanse_request_seconds_sum {self.seconds:.6f}"]
            + [f"hanse_request_seconds_count {total}"]
        )
        return "\n".join(lines) + "\n"


class Service:
    """The application and what lives as long as it does. token: what a request has to bear; None: anybody may ask."""

    def __init__(self, router: Router, records: Records, *, limits: Limits | None = None, token: str | None = None, resize: bool = False):
        self.router, self.records, self.limits, self.metrics = router, records, limits or Limits(), Metrics()
        self.resize, self.problem = resize, ""
        self._token = token
        self._under_way = self._reserved_bytes = 0
        self._waiting: asyncio.Queue[tuple[list[Item], asyncio.Future[list[Answer]]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "hanse-score")

    def app(self) -> Starlette:
        routes = [
            Route("/score", self._score, methods=["POST"]),
            Route("/health", self._health),
            Route("/version", self._version),
            Route("/metrics", self._metrics),
        ]
        handlers: Mapping[Any, Any] = {
            Declined: lambda request, error: _json(error.status, {"error": error.error, "hint": error.hint}, error.headers),
            HTTPException: lambda request, error: _json(error.status_code, {"error": error.detail, "hint": _PATHS}, error.headers),
            ClientDisconnect: lambda request, error: _json(400, {"error": "the request was broken off", "hint": ""}),
            Exception: lambda request, error: _json(500, {"error": "this failed at the server", "hint": "Its log says why."}),
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    # -------------------------------------------------------------------------------------------------------------------- requests

    async def _score(self, request: Request) -> Response:
        began, status = time.perf_counter(), 500
        try:
            self._admit(request)
            with self._place(request):
                response = await self._scored(request)
            status = response.status_code
            return response
        except Declined as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = 400
            raise
        finally:
            self.metrics.request(status, time.perf_counter() - began)

    @contextlib.contextmanager
    def _place(self, request: Request) -> Iterator[None]:
        """One of the requests that are under way, with room for its body."""
        room = min(_declared(request, self.limits.body_bytes), self.limits.body_bytes)
        if self._under_way >= self.limits.requests or self._reserved_bytes + room > self.limits.bodies_bytes:
            raise Declined(503, f"{self._under_way} requests are under way", "Come again in a second.", Retry_After="1")
        self._under_way += 1
        self._reserved_bytes += room
        try:
            yield
        finally:
            self._under_way -= 1
            self._reserved_bytes -= room

    async def _scored(self, request: Request) -> Response:
        kind = request.headers.get("content-type", _IMAGE_TYPES[1]).partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.startswith(_IMAGE_TYPES):
            raise Declined(415, f"the body is of type {kind[:80]}", "Send an image as image/png, or a list as application/json.")
        body = await self._body(request)
        if kind == "application/json":
            return _json(200, await self._answers(_listed(body, self.limits.rows, self.router.current.schema.slices)))
        answer = (await self._answers([_single(request, body, self.router.current.schema.slices)]))[0]
        return _json(422 if isinstance(answer, Refusal) else 200, answer)

    async def _body(self, request: Request) -> bytes:
        """The request's body. One that is too large is read to its end, up to a bound, so that its sender gets to read why."""
        limit, body, size = self.limits.body_bytes, bytearray(), 0
        too_large = Declined(413, f"the body is above {limit:,} bytes", "Send fewer or smaller inputs.", Connection="close")
        if _declared(request, 0) > 4 * limit:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_within_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        body += chunk
                    elif size > 4 * limit:
                        raise too_large
        except TimeoutError:
            raise Declined(408, "the body did not come in time", "Send it at once.", Connection="close") from None
        if size > limit:
            raise too_large
        if not body:
            raise Declined(400, "the body is empty", "Send an image, or a JSON list.")
        return bytes(body)

    async def _health(self, request: Request) -> Response:
        problems = [problem for problem in (self.router.problem, self.problem) if problem]
        return _json(200, {"status": "degraded" if problems else "ok", "problems": problems})

    async def _version(self, request: Request) -> Response:
        self._admit(request)
        await asyncio.get_running_loop().run_in_executor(self._thread, self.router.follow)
        current, candidate = self.router.current, self.router.candidate
        beside = candidate and {
            "version": candidate.version,
            "mode": "shadow" if candidate.share is None else "canary",
            "share": candidate.share,
        }
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.router.since))
        return _json(200, {"version": current.version, "threshold": current.threshold, "since": since, "candidate": beside})

    async def _metrics(self, request: Request) -> Response:
        self._admit(request)
        return Response(self.metrics.text(self.router, self._under_way), media_type="text/plain; version=0.0.4")

    def _admit(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise Declined(401, "the token is missing or wrong", "Send `Authorization: Bearer TOKEN`.", WWW_Authenticate="Bearer")

    # --------------------------------------------------------------------------------------------------------------------- batches

    async def _answers(self, items: list[Item]) -> list[Answer]:
        future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        await self._waiting.put((items, future))
        return await future

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._batches())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._thread.shutdown()

    async def _batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and sum(len(items) for items, _ in batch) < self.limits.batch:
                batch.append(self._waiting.get_nowait())
            try:
                answers, inputs, current = await loop.run_in_executor(
                    self._thread, self._work, [item for items, _ in batch for item in items]
                )
            except Exception as error:
                logger.exception("a batch failed")
                _settle(batch, error)
                continue
            _settle(batch, answers)
            if self.router.candidate is not None:
                await loop.run_in_executor(self._thread, self._shadow, inputs, current)

    def _work(self, items: Sequence[Item]) -> tuple[list[Answer], list[Input], list[Answer]]:
        """All answers; and what is left to do for a shadow once they are on their way: the inputs that were scored, and their answers."""
        self.router.follow()
        read = [as_input(item, self.router.current.schema, resize=self.resize) for item in items]
        inputs = [each for each in read if isinstance(each, Input)]
        scored, pairs = self.router.answer(inputs)
        self._kept(lambda: self.records.keep(inputs, scored, pairs))
        rest = iter(scored)
        answers = [each if isinstance(each, Refusal) else next(rest) for each in read]
        self.metrics.answers(answers)
        self.metrics.pairs(pairs)
        return answers, inputs, scored

    def _shadow(self, inputs: Sequence[Input], answers: Sequence[Answer]) -> None:
        pairs = self.router.shadow(inputs, answers)
        self._kept(lambda: self.records.keep_pairs(pairs))
        self.metrics.pairs(pairs)

    def _kept(self, write: Callable[[], None]) -> None:
        """A full disk stops no answers: /health says it."""
        try:
            write()
            self.problem = ""
        except StorageFull as error:
            self.problem = str(error)
            logger.error("not recorded: %s", error)


def serve(service: Service, listener: socket.socket, *, ready: Callable[[str], None] = lambda url: None) -> None:
    """Answer until SIGTERM or Ctrl-C; then finish what is under way. ready: is told the URL."""
    server = server_of(service)
    host, port = listener.getsockname()[:2]
    signals = signal.SIGTERM, signal.SIGINT  # uvicorn stops at them, then sends them on to whoever was there before: nobody
    before = [signal.signal(each, lambda *_: None) for each in signals]
    try:
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        server.run([listener])
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def server_of(service: Service) -> uvicorn.Server:
    """The server, to be run with a listening socket."""
    return uvicorn.Server(
        uvicorn.Config(
            service.app(),
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(service.limits.stop_within_s),
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. port: 0 for any that is free. Raises ConfigError if it cannot be had."""
    # The protocol is named, since asyncio sends answers without delay only on sockets that name it.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen at {host}:{port}: {error}", hint="Name another port, or 0 for any.") from error
    return listener


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigError if it is too short to be one."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if len(token) < _MIN_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{path}: a token has at least {_MIN_TOKEN} ASCII characters", hint="`openssl rand -hex 32` makes one.")
    return token


_PATHS = "There are POST /score, GET /health, GET /version and GET /metrics."


def _declared(request: Request, otherwise: int) -> int:
    """How long the body is by its header."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else otherwise


def _listed(body: bytes, rows: int, slices: Sequence[str]) -> list[Item]:
    """The items in a JSON list."""
    try:
        listed = msgspec.json.decode(body, type=list[str | list[float] | _Row])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        hint = 'Send a list of base64 texts, of rows of numbers, or of {"input": …, "name": …, "slices": {…}, "label": 0 or 1}.'
        raise Declined(400, f"the body is not what it has to be: {error}", hint) from error
    if not 0 < len(listed) <= rows:
        raise Declined(413 if listed else 400, f"the list has {len(listed):,} inputs", f"Send 1 to {rows:,} at a time.")
    return [_item(each if isinstance(each, _Row) else _Row(each), slices) for each in listed]


def _item(row: _Row, slices: Sequence[str]) -> Item:
    content: Content = row.input if isinstance(row.input, list | dict) else _unpacked(row.input)
    return Item(row.name or _name(content), content, _slices(row.slices, slices), row.label)


def _single(request: Request, body: bytes, slices: Sequence[str]) -> Item:
    """The image that is the body; the query has its name, label and slices."""
    query = dict(request.query_params)
    name, label = query.pop("name", "")[:200], query.pop("label", "")
    if label not in ("", "0", "1"):
        raise Declined(400, f"label is {label[:40]!r}", "It is 0 or 1.")
    return Item(name or _name(body), body, _slices(query, slices), int(label) if label else None)


def _slices(given: Mapping[str, str], slices: Sequence[str]) -> Mapping[str, str]:
    if unknown := [name for name in given if name not in slices]:
        raise Declined(400, f"{unknown[0][:80]!r} is none of the project's slices", f"Those are: {', '.join(slices) or 'none'}.")
    return {name: value[:200] for name, value in given.items()}


def _unpacked(text: str) -> bytes:
    """What base64 text holds; nothing, which is no image, if it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _name(content: Any) -> str:
    """A name for an input that has none: the same for the same bytes."""
    data = content if isinstance(content, bytes) else msgspec.json.encode(content)
    return f"input-{blake3(data).hexdigest(8)}"


def _settle(batch: Sequence[tuple[list[Item], asyncio.Future[list[Answer]]]], result: list[Answer] | Exception) -> None:
    """Give each request its part of the answers, unless its client has gone."""
    start = 0
    for items, future in batch:
        if not future.done():
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result[start : start + len(items)])
        start += len(items)


def _json(status: int, value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")
