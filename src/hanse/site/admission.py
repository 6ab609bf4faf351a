"""Whether a site takes a job, and the sandbox that its code would run in: the same with a server and without one."""

from __future__ import annotations

import sys
from datetime import datetime

from hanse.errors import PolicyRefused, Refused
from hanse.identity.certificates import Identity
from hanse.identity.kit import Kit
from hanse.jobs.archive import Manifest, open_manifest
from hanse.messages.wire import Offer, Resources
from hanse.sandbox import Sandbox
from hanse.site.policy import Policy, check_offer


def allow(
    offer: Offer, *, kit: Kit, policy: Policy, roots: bytes, resources: Resources, no_sandbox: str | None, now: datetime | None = None
) -> tuple[Manifest, Identity]:
    """What is offered and who has signed it, if the site takes it. Raises PolicyRefused, IdentityError and what else stands against a job.

    resources: what the site has. no_sandbox: why there is none. now: when the signature has to be good, default the present.
    """
    manifest, submitter = open_manifest(offer.manifest, offer.signature, roots, now=now)
    check_offer(policy, manifest, submitter)
    if manifest.sites and kit.name not in manifest.sites:
        raise Refused(f"job {manifest.name!r} is for {', '.join(manifest.sites[:10])}, not for {kit.name!r}")
    if not manifest.resources.fits(resources):
        raise Refused(f"job {manifest.name!r} asks for {manifest.resources}, and this site has {resources}")
    if no_sandbox is not None and policy.sandbox == "required":
        raise PolicyRefused(f"this site runs no code without a sandbox, and has none: {no_sandbox}", clause="sandbox")
    return manifest, submitter


def sandbox_of(kit: Kit, *, gpus: bool) -> Sandbox:
    """The sandbox for a site's training code. Raises ConfigError for a folder to keep things in that holds what code may not see."""
    return Sandbox(
        python=kit.python or sys.executable,
        readable=[kit.folder / path for path in kit.data],
        writable=kit.kept_folders(),
        hidden=[kit.folder, kit.state_folder],
        gpus=gpus,
    )
