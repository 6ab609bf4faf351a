"""`PocEnv`: a federation of real processes on this machine, with real certificates, for one job."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hanse.environments.federation import Placement, connected
from hanse.environments.local import OPEN_POLICY, local_federation, local_project
from hanse.environments.loop import run_async
from hanse.environments.remote_run import STOPPED_WITHIN_S, RemoteRun
from hanse.environments.settings import check_console, check_site_config, check_sites, roster_of
from hanse.errors import LinkBroken, NotInstalled, Refused
from hanse.identity.kit import read_kit
from hanse.jobs.recipe import Recipe
from hanse.server.run import Run
from hanse.site.policy import read_policy
from hanse.transport.courier import Roster


@dataclass(frozen=True, kw_only=True)
class PocEnv:
    """A proof of concept: a server and sites as processes of this machine, which talk over mutual TLS and leave nothing behind.

    An authority is made for the job, each site makes its key and joins by a token, and the job is signed, submitted and fetched, as in a
    real federation. The result has the same bits as in `SimEnv` with the same sites.

    num_clients: how many sites, named site-1, site-2 and so on. sites: their names, instead.
    site_config: JSON values for single sites, by name, on top of the recipe's `config`.
    policy: a policy.yaml for every site; None: what a job asks is allowed, and its code, which is your own, runs without a sandbox.
    runs: the folder that run folders are made in.
    console: "auto", "plain", "rich", "json" or "quiet".
    """

    num_clients: int | None = None
    sites: Sequence[str] = ()
    site_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: str | Path | None = None
    runs: str | Path = "runs"
    console: str = "auto"

    def __post_init__(self) -> None:
        for package in ("aiosqlite", "sqlalchemy"):  # which only the server's process imports
            if find_spec(package) is None:
                raise NotInstalled(f"PocEnv needs the package {package!r}.", hint="Install it with: pip install 'hanse[server]'")
        check_sites(self, self.num_clients, self.sites)
        check_site_config(self.site_config, self.roster())
        check_console(self, self.console)
        local_project(self.roster(), port=1)
        if self.policy is not None:
            read_policy(Path(self.policy))

    def roster(self) -> Roster:
        """The sites' names, ranked."""
        return roster_of(self.num_clients, self.sites)

    def execute(self, recipe: Recipe) -> Run:
        """Run the job to its end, and end all processes. Ctrl-C stops the job; a second one does not wait for what it has reached.

        Raises JobFailed or JobStopped, which name the run folder, if it does not get there.
        """
        roster = self.roster()
        recipe.check_sites(len(roster))
        settings = {name: value for name, value in asdict(self).items() if name not in ("policy", "runs", "console")}
        run = RemoteRun(recipe, self.runs, settings, roster, self.console)
        folder = Path(tempfile.mkdtemp(prefix="hanse-poc-"))
        try:
            return run_async(self._carry_out(run, roster, folder))
        except (KeyboardInterrupt, TimeoutError):
            raise run.stopped() from None
        except LinkBroken as error:
            raise run.failed(str(error)) from None
        except BaseException:
            if not run.job:
                run.discard()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _carry_out(self, run: RemoteRun, roster: Roster, folder: Path) -> Run:
        policy = OPEN_POLICY if self.policy is None else Path(self.policy).read_text(encoding="utf-8")
        async with (
            local_federation(folder, roster, policy=policy) as federation,
            connected(kit := read_kit(federation.admin_kit)) as client,
        ):
            await run.submit(client, kit, Placement(sites=tuple(roster), site_config=self.site_config))
            following, broken = asyncio.create_task(run.follow(client)), asyncio.create_task(federation.broken())
            try:
                await _first(following, broken)
            except asyncio.CancelledError:
                _not_cancelled()
                async with asyncio.timeout(STOPPED_WITHIN_S):
                    with contextlib.suppress(Refused):  # it has just ended by itself
                        await client.call("abort", job=run.job)
                    await _first(following, broken)
            finally:
                following.cancel()
                broken.cancel()
            return await run.close(client)


async def _first(*tasks: asyncio.Task[None]) -> None:
    """Wait for the first of them, and raise what it raised. The tasks go on if this is cancelled."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _not_cancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
