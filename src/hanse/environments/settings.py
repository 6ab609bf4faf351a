"""What the environments' settings have in common: the sites' names and configs, the console, and how they are checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hanse.errors import ConfigError
from hanse.jobs.recipe import json_values
from hanse.server.console import MODES
from hanse.simulation.roster import NamedSites, NumberedSites
from hanse.transport.courier import Roster

SITE_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,100}")


def roster_of(num_clients: int | None, sites: Sequence[str]) -> Roster:
    """The sites' names, ranked: those given, or site-1 and so on."""
    return NumberedSites(num_clients) if num_clients else NamedSites(sites)


def check_sites(env: object, num_clients: int | None, sites: Sequence[str]) -> None:
    """Raises ConfigError unless exactly one of the two says which sites there are."""
    if (num_clients is None) == (not sites):
        raise ConfigError(f"{type(env).__name__} needs either num_clients, a number of sites, or sites, their names")
    check_names(sites)
    check_counts(env, "num_clients")


def check_names(sites: Sequence[str]) -> None:
    """Raises ConfigError unless `sites` are different names that a site may have."""
    named = not isinstance(sites, str) and all(isinstance(name, str) and SITE_NAME.fullmatch(name) for name in sites)
    if not named or len(set(sites)) < len(sites):
        raise ConfigError(f"sites is {sites!r}: give a list of different names, each of 1 to 100 printable characters, without /")


def check_counts(env: object, *names: str) -> None:
    """Raises ConfigError for the first of these settings that is neither None nor a whole number from 1."""
    for name in names:
        value = getattr(env, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{type(env).__name__} has {name}={value!r}: it must be a whole number from 1")


def check_site_config(site_config: Mapping[str, Mapping[str, Any]], roster: Roster | None) -> None:
    """Raises ConfigError unless sites, of the roster if it is known, are mapped to JSON values."""
    if not isinstance(site_config, Mapping):
        raise ConfigError(f"site_config is {site_config!r}: it must map sites to their JSON values")
    for site, config in site_config.items():
        json_values(f"site_config of {site!r}", config)
        try:
            if roster is not None:
                roster.index(site)
        except ValueError as error:
            raise ConfigError(f"site_config names a site that is not there: {error}") from error


def check_console(env: object, console: str) -> None:
    """Raises ConfigError unless it is one of the console's modes."""
    if console not in MODES:
        raise ConfigError(f"{type(env).__name__} has console={console!r}: it must be one of {', '.join(MODES)}")
