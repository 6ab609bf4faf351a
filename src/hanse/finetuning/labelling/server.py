"""The labelling queue as a page in a browser on the same machine. No other machine reaches it, and it loads nothing from elsewhere."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hanse.errors import ConfigError, HanseError
from hanse.finetuning.labelling.labels import Label
from hanse.finetuning.labelling.queue import BAND, Band, Mode, Queue, Shown, Yield

HOST = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_BODY_BYTES = 10_000
_RECENT = 10
_BARS = 50
_LARGEST = 2048

Score = Annotated[float, msgspec.Meta(ge=0, le=1)]
Window = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}$")]


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What each request says: which browser window it comes from, and what that looks through."""

    window: Window
    mode: Mode
    band: tuple[Score, Score]


class GiveLabel(Ask, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Label the image that the window shows."""

    file: str
    label: Literal[-1, 0, 1]


class Undo(Ask, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Take back the label of a file, or the window's last one."""

    file: str | None = None


class Image(msgspec.Struct, frozen=True):
    """An image to show. at: its number in the pool."""

    at: int
    file: str
    score: float
    how: str
    columns: dict[str, str]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a window shows. done, of: its mode's progress. recent: the last labels, newest first, each with its image's number in the pool.

    mine: whether this window has a label to take back. problem: why nothing was done.
    """

    image: Image | None
    done: int
    of: int
    yields: Yield
    recent: list[tuple[Label, int]]
    mine: bool
    problem: str


A = TypeVar("A", bound=Ask)


@dataclass(frozen=True)
class Doors:
    """Who may come in. port: of this server. token: in the first URL, then in a cookie. page: in each request that changes something."""

    port: int
    token: str
    page: str

    @property
    def origin(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def cookie(self) -> str:
        return f"hanse-labelling-{self.port}"

    @property
    def url(self) -> str:
        """The page's address, with the token."""
        return f"{self.origin}/?token={self.token}"

    def refuse(self, request: Request) -> str:
        """Why a request may not come in, or an empty text. The Host header keeps out names of other pages that resolve to this machine."""
        headers = request.headers
        if headers.getlist("host") != [f"{HOST}:{self.port}"]:
            return f"this page is at {self.origin} and nowhere else"
        if headers.get("origin", self.origin) != self.origin or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "the request comes from another page"
        first = request.query_params.get("token", "") if request.url.path == "/" else ""
        if not any(_same(given, self.token) for given in (request.cookies.get(self.cookie, ""), first)):
            return "the address needs the token that was printed when the queue was started"
        if request.method != "GET" and not _same(headers.get("x-hanse-page", ""), self.page):
            return "the request does not come from this queue's page: load it again"
        return ""


@dataclass(frozen=True)
class Guard:
    """Lets nobody in whom the doors refuse, and puts the headers on every answer that keep the page to itself."""

    app: ASGIApp
    doors: Doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        why = self.doors.refuse(Request(scope))

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.lower().encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        await (PlainTextResponse(f"Refused: {why}.", 403) if why else self.app)(scope, receive, send_guarded)


@dataclass(frozen=True)
class Desk:
    """The requests of the page. All that touches the queue runs in one event loop, one at a time. title: what is labelled, for people."""

    queue: Queue
    doors: Doors
    title: str
    band: Band

    def app(self) -> ASGIApp:
        routes = [
            Route("/", self.page),
            Route("/page.css", self.part),
            Route("/page.js", self.part),
            Route("/favicon.ico", self.nothing),
            Route("/about", self.about),
            Route("/picture/{at:int}", self.picture),
            Route("/next", self.next, methods=["POST"]),
            Route("/label", self.label, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
        ]
        return Guard(Starlette(routes=routes), self.doors)

    async def page(self, request: Request) -> Response:
        response = HTMLResponse(_part("page.html").replace("{{page}}", self.doors.page))
        response.set_cookie(self.doors.cookie, self.doors.token, httponly=True, samesite="strict")
        return response

    async def part(self, request: Request) -> Response:
        name = request.url.path[1:]
        return Response(_part(name), media_type="text/css" if name.endswith("css") else "text/javascript")

    async def nothing(self, request: Request) -> Response:
        return Response(status_code=204)

    async def about(self, request: Request) -> Response:
        """What stays the same: the title, who labels, the band to begin with, and how many images have which score, by its square root."""
        pool = self.queue.pool
        bars = np.histogram(np.sqrt(pool.scores), bins=_BARS, range=(0, 1))[0]
        about = {"title": self.title, "by": self.queue.labels.by, "band": self.band, "images": int(bars.sum()), "bars": bars.tolist()}
        return _json({**about, "likeness": pool.embeddings is not None, "pictures": pool.images is not None})

    def picture(self, request: Request) -> Response:
        """An image as PNG; 404 if there is none or it cannot be read. Runs in a thread, and only reads."""
        images, at = self.queue.pool.images, request.path_params["at"]
        if images is None or at >= len(images):
            return PlainTextResponse("there is no such image", 404)
        try:
            return Response(_png(images[at]), media_type="image/png")
        except (OSError, ValueError, SyntaxError) as error:
            return PlainTextResponse(f"the image cannot be read: {error}", 404)

    async def next(self, request: Request) -> Response:
        return await self._answer(request, Ask, lambda ask: self.queue.next(ask.window, ask.mode, ask.band))

    async def label(self, request: Request) -> Response:
        def give(ask: GiveLabel) -> Shown | None:
            self.queue.label(ask.window, ask.file, ask.label)
            return self.queue.next(ask.window, ask.mode, ask.band)

        return await self._answer(request, GiveLabel, give)

    async def undo(self, request: Request) -> Response:
        return await self._answer(request, Undo, lambda ask: self.queue.undo(ask.window, ask.file))

    async def _answer(self, request: Request, kind: type[A], do: Callable[[A], Shown | None]) -> Response:
        try:
            ask = msgspec.json.decode(await _body(request), type=kind)
        except msgspec.MsgspecError as error:
            return PlainTextResponse(f"the request is wrong: {error}", 400)
        try:
            return _json(self._view(ask, do(ask)))
        except HanseError as error:
            return _json(self._view(ask, self.queue.next(ask.window, ask.mode, ask.band), str(error)), 409)

    def _view(self, ask: Ask, shown: Shown | None, problem: str = "") -> View:
        queue, pool = self.queue, self.queue.pool
        given = [each for each in queue.labels.given.values() if each.file in queue.index]
        done, of = queue.progress(ask.mode, ask.band)
        return View(
            image=None
            if shown is None
            else Image(
                at=shown.index,
                file=pool.names[shown.index],
                score=float(pool.scores[shown.index]),
                how=shown.how,
                columns=pool.of(shown.index),
            ),
            done=done,
            of=of,
            yields=queue.tally(),
            recent=[(each, queue.index[each.file]) for each in given[: -_RECENT - 1 : -1]],
            mine=any(each.window == ask.window for each in given),
            problem=problem,
        )


@contextmanager
def serving(queue: Queue, *, title: str = "", band: Band = BAND, port: int = 0) -> Iterator[str]:
    """Serve the queue's page while the block runs, on this machine only; the page's address, with its token.

    port: 0 for any that is free. Raises ConfigError if the port is taken, or the band is none.
    """
    import uvicorn

    if not 0 <= band[0] < band[1] <= 1:
        raise ConfigError(f"{band[0]} to {band[1]} is no band of scores: it goes from a lower to a higher one, between 0 and 1")
    with socket.socket() as listening:
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of this machine cannot be used: {error.strerror}", hint="Choose another, or 0 for any."
            ) from error
        listening.listen()
        doors = Doors(listening.getsockname()[1], secrets.token_urlsafe(24), secrets.token_urlsafe(24))
        app = Desk(queue, doors, title, band).app()
        config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), name="labelling")
        thread.start()
        try:
            yield doors.url
        finally:
            server.should_exit = True
            thread.join()


def _same(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode(), expected.encode())


def _part(name: str) -> str:
    return files("hanse.finetuning.labelling").joinpath(name).read_text("utf-8")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _body(request: Request) -> bytes:
    """Raises msgspec.DecodeError if it is too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_BYTES:
            raise msgspec.DecodeError("it is too long")
    return body


def _png(image: Any) -> bytes:
    """image: uint8 (height, width, channels), or the path of a file. Larger ones than a screen shows are made smaller."""
    from PIL import Image as Pictures
    from PIL import ImageOps

    if isinstance(image, Path):
        with Pictures.open(image) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits a pixel: Pillow would cut what is above 255
                picture = Pictures.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture = picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB")
    else:
        picture = Pictures.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((_LARGEST, _LARGEST))
    written = BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return written.getvalue()
