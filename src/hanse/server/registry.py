"""Who is in the federation: its sites, the tokens and certificates they get, and the names that are not accepted any more."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanse.errors import IdentityError, Refused
from hanse.identity.authority import Authority
from hanse.identity.certificates import Identity, Role, certificates_in
from hanse.identity.tokens import new_token
from hanse.server.store import SiteRecord, Store

logger = logging.getLogger(__name__)


class Registry:
    """What the store says of sites and names, at hand without asking it. `load` before anything else.

    address: the server's host:port, for tokens. certificate_days: how long the certificates that it issues are good.
    """

    def __init__(self, store: Store, authority: Authority, *, address: str, certificate_days: float) -> None:
        self.sites: Mapping[str, SiteRecord] = {}
        self.revoked: frozenset[str] = frozenset()
        self._store, self._authority = store, authority
        self._address, self._certificate_days = address, certificate_days

    async def load(self) -> None:
        self.sites = {site.name: site for site in await self._store.sites()}
        self.revoked = frozenset(await self._store.revoked())

    def admit(self, who: Identity) -> None:
        """Raises IdentityError for a revoked name, Refused for a disabled site."""
        if who.name in self.revoked:
            raise IdentityError(f"the certificates of {who.name!r} are revoked.", hint="Ask the project admin.")
        if who.role is Role.SITE and who.name in self.sites and self.sites[who.name].disabled:
            raise Refused(f"the site {who.name!r} is disabled.", hint="Ask the project admin, or the admin of your organisation.")

    def site(self, name: str) -> SiteRecord:
        """Raises Refused, which lists the sites, if there is none of that name."""
        if name not in self.sites:
            raise Refused(f"there is no site {name!r:.120}; there are: {', '.join(sorted(self.sites)[:20]) or 'none'}")
        return self.sites[name]

    @property
    def able(self) -> set[str]:
        """The sites that may take part in jobs."""
        return {name for name, site in self.sites.items() if not site.disabled and name not in self.revoked}

    async def note(self, who: Identity, **changes: Any) -> None:
        """Note what is new of a site: disabled, seen, version, resources, expires."""
        known = self.sites.get(who.name, SiteRecord(who.name, who.organisation))
        await self._put(replace(known, organisation=who.organisation, **changes))

    async def switch(self, name: str, *, disabled: bool) -> None:
        """Let a site take part no more, or again."""
        await self._put(replace(self.site(name), disabled=disabled))

    async def revoke(self, name: str) -> None:
        """Accept no certificate of this name any more."""
        await self._store.revoke(name)
        self.revoked |= {name}

    def token(self, federation: str, site: str, organisation: str, hours: float) -> str:
        """A join token for a site. Raises Refused if the name is revoked, or another organisation's."""
        if site in self.revoked:
            raise Refused(f"the name {site!r} is revoked for good.", hint="Give the site another name.")
        if site in self.sites and self.sites[site].organisation != organisation:
            raise Refused(f"the site {site!r} is of another organisation, {self.sites[site].organisation!r}.")
        return new_token(self._authority, site=site, organisation=organisation, federation=federation, address=self._address, hours=hours)

    async def enrol(self, joining: Identity, token: int, csr: str) -> str:
        """The first certificate of a site, as PEM, for the token whose certificate has this serial. Raises IdentityError if it was used."""
        site = Identity(joining.federation, Role.SITE, joining.name, joining.organisation)
        certificate = self._issue(site, csr)  # a request that is no good does not use the token up
        await self._store.use_token(token)
        logger.info("%s has joined", site)
        return await self._issued(site, certificate)

    async def renew(self, who: Identity, csr: str) -> str:
        """A new certificate for the same identity, as PEM."""
        return await self._issued(who, self._issue(who, csr))

    def _issue(self, who: Identity, csr: str) -> bytes:
        return self._authority.issue(who, csr.encode(), days=self._certificate_days)

    async def _issued(self, who: Identity, certificate: bytes) -> str:
        if who.role is Role.SITE:
            await self.note(who, expires=certificates_in(certificate)[0].not_valid_after_utc.timestamp())
        return certificate.decode()

    async def _put(self, site: SiteRecord) -> None:
        self.sites = {**self.sites, site.name: site}
        await self._store.put_site(site)
