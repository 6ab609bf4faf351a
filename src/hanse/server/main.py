"""Runs a federation's server from its kit, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from datetime import UTC, datetime

from hanse.errors import ConfigError
from hanse.figures import published
from hanse.identity.authority import new_key, request
from hanse.identity.certificates import Credentials, Role, addresses_of
from hanse.identity.kit import CREDENTIALS, Kit
from hanse.process import tune_memory
from hanse.server.service import FederationServer, Settings
from hanse.server.track import Target
from hanse.transport.grpc import serve

logger = logging.getLogger(__name__)


async def serve_kit(kit: Kit, *, ready: Callable[[str], object] = lambda address: None) -> None:
    """Serve until SIGTERM or SIGINT. ready: called with HOST:PORT once sites can connect. Jobs that ran go on by themselves.

    Raises ConfigError if the kit is no server's or the server cannot listen, IdentityError for its credentials.
    """
    if kit.role is not Role.SERVER or kit.listen is None:
        raise ConfigError(f"{kit.folder} is the kit of a {kit.role}: `hanse server start` needs the server's.")
    # With a heap for each of gRPC's threads much is kept of what passes through; with a single one, an idle connection takes 10 KiB more,
    # for what lasts lies among what does not.
    tune_memory(arenas=2)
    ended = asyncio.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(kind, ended.set)
    service = FederationServer(settings_of(kit), fresh(kit), kit.authority())
    with published(kit.metrics, service.figures):
        await _serve(kit, service, ended, ready)


async def _serve(kit: Kit, service: FederationServer, ended: asyncio.Event, ready: Callable[[str], object]) -> None:
    listen, told = kit.listen, False
    assert listen is not None
    try:
        await service.start()
        while not ended.is_set():
            credentials = fresh(kit)
            server = await serve(service, credentials, listen)
            service.drop = server.drop
            listen = f"{listen.rpartition(':')[0]}:{server.port}"
            if not told:
                told = True
                logger.info("the server of %s listens at %s", kit.federation, listen)
                ready(f"{kit.server.rpartition(':')[0]}:{server.port}")
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(60.0, (credentials.renew_at - datetime.now(UTC)).total_seconds())):
                        await ended.wait()
            finally:
                await server.close()  # sites connect again by themselves, to one with a new certificate if it was time for that
    finally:
        await service.close()
        logger.info("the server has ended; jobs that run go on when it is started again")


def settings_of(kit: Kit) -> Settings:
    """How a server with this kit runs. Raises ConfigError, NotInstalled for a receiver that cannot be had."""
    if kit.track is not None:
        Target.of(kit.track)
    blobs = kit.blobs if kit.blobs is None or "://" in kit.blobs else str(kit.folder / kit.blobs)
    return Settings(
        state=kit.state_folder,
        address=kit.server,
        database=kit.database,
        blobs=blobs,
        certificate_days=kit.certificate_days,
        absence_s=kit.absence_s,
        max_running=kit.max_running,
        sandbox=kit.sandbox,
        hidden=[kit.folder],
        track=kit.track,
    )


def fresh(kit: Kit) -> Credentials:
    """The server's credentials; new ones if two thirds of their time are over. It holds the authority that issues them."""
    credentials = kit.credentials()
    if datetime.now(UTC) < credentials.renew_at:
        return credentials
    key, addresses = new_key(), addresses_of(credentials.certificate)
    certificate = kit.authority().issue(credentials.identity, request(key), days=kit.certificate_days, addresses=addresses)
    renewed = Credentials(key, certificate, credentials.roots)
    renewed.save(kit.folder / CREDENTIALS)
    logger.info("the server's certificate is renewed, until %s", renewed.expires)
    return renewed
