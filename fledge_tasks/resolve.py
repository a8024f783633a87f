"""The stage 'resolve': from a reference to an entry of fledge.lock, the OCI config, and the agent.

The one stage whose result depends on the world outside. What it finds is pinned in the lock file,
and it runs again only for what is not pinned, for a local source that has changed, or for content
that the store has lost; that is then asked for by its digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
from collections.abc import Mapping
from pathlib import Path

from fledge_tasks import agent
from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import Digest, sha256_bytes, short
from fledge_tasks.download import download, without_secrets
from fledge_tasks.errors import AgentError, LockError, OfflineError, SourceError
from fledge_tasks.fresh import is_resolved, is_unpacked
from fledge_tasks.keys import Agent, Config
from fledge_tasks.lock import LockedAgent, LockedImage
from fledge_tasks.oci import layout, source
from fledge_tasks.oci.manifest import parse_config
from fledge_tasks.plan import Layer
from fledge_tasks.planner import Planner
from fledge_tasks.progress import meter
from fledge_tasks.stages import DATA, HIT, Values, keep_blob
from fledge_tasks.store import Store

_CREATED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)")


def resolve(planner: Planner, image: ImageConfig, *, update: bool = False, update_agent: bool = False) -> Values:
    """Find out which image and agent are meant, pin them, and keep config and agent in the store.

    Layers that had to be exported for that go into the store, too. With `update` an image that is
    pinned is asked for anew, with `update_agent` an agent. However many images name one agent at
    once, it is asked for once. Raises what `source.resolve` and `download` raise, and LockError when the
    planner is locked and would have to pin another image; the lock file is as it was then.
    """
    store = planner.store
    name, agent_name = planner.lock_name(image), planner.agent_name(image)
    key = sha256_bytes(f"resolve {planner.workspace.lock} {name} {agent_name}".encode())
    with store.building(key):
        is_stale = planner.unresolved(image) is not None
        if not update and not is_stale and is_resolved(planner, image):
            return HIT
        pinned = planner.lock.read().images.get(name)
        is_pinned = pinned is not None and pinned.image.origin == "docker"
        locked, moved = _resolve_image(planner, image, key, pinned if is_pinned and not update else None)
        if planner.locked and (pinned is None or _content(locked) != _content(pinned)):
            raise LockError(
                f"{name} is not what the image itself says",
                where=str(planner.workspace.lock),
                hint="fledge.lock was edited by hand: run `fledge lock` without --locked",
            )
        with contextlib.ExitStack() as stack:
            agents: dict[str, LockedAgent] = {}
            if agent_name is not None:
                stack.enter_context(store.building(sha256_bytes(f"{planner.workspace.lock} {agent_name}".encode())))
                known = planner.lock.read().agents.get(agent_name)
                if update_agent or (update and not (known and store.find(Agent(digest=known.digest).key()))):
                    known = None
                agents[agent_name], count = _resolve_agent(planner, image, key, known)
                moved += count
            stack.enter_context(store.building(sha256_bytes(f"lock file {planner.workspace.lock}".encode())))
            planner.lock.update({name: locked}, agents)
    planner.forget(image)
    return {"bytes": moved}


def _content(locked: LockedImage) -> tuple[str, list[str]]:
    """Return what an image is made of, however it is packed where it was found."""
    return locked.image.config, [layer.diff_id for layer in locked.image.layers]


def _resolve_image(
    planner: Planner, image: ImageConfig, key: Digest, pinned: LockedImage | None
) -> tuple[LockedImage, int]:
    reference = planner.reference(image)
    if pinned is not None:
        reference = dataclasses.replace(reference, transport="docker", digest=pinned.image.manifest)
    with planner.store.staging(key) as scratch:
        resolution = source.resolve(
            reference,
            folder=image.folder,
            platform=image.source.platform,
            scratch=scratch,
            offline=planner.offline,
            digest_of=planner.digest_of,
        )
        if pinned is not None and resolution.image.config != pinned.image.config:
            raise SourceError(
                f"the config of the pinned image is {pinned.image.config}, the registry has {resolution.image.config}",
                where=reference.canonical,
                hint="fledge.lock was edited by hand: run `fledge lock --update`",
            )
        moved = _keep_config(planner.store, resolution.config)
        if resolution.blobs is not None:
            into = scratch / "into"
            into.mkdir()
            for layer in dict.fromkeys(map(Layer.of, resolution.image.layers)):
                if not is_unpacked(planner.store, layer):
                    where = f"{image.name}: layer {short(layer.ref.diff_id)}"
                    layout.adopt(
                        resolution.blobs / layer.ref.blob.removeprefix("sha256:"), layer.ref, into, where=where
                    )
                    moved += keep_blob(planner.store, layer, into)
    config = parse_config(resolution.config, where=reference.canonical)
    return pinned or LockedImage(resolution.image, resolution.identity, created(config)), moved


def _keep_config(store: Store, config: bytes) -> int:
    record = Config(digest=sha256_bytes(config))
    with store.building(record.key()):
        if store.find(record.key()) is not None:
            return 0
        with store.staging(record.key()) as folder:
            (folder / DATA).write_bytes(config)
            return store.publish(record.text(), record.stage(), folder).size


def _resolve_agent(
    planner: Planner, image: ImageConfig, key: Digest, pinned: LockedAgent | None
) -> tuple[LockedAgent, int]:
    spec = planner.agent_spec(image)
    assert spec is not None
    checksum = spec.checksum or (pinned.digest if pinned else None)
    pinned_url = pinned.url if pinned is not None and pinned.digest == checksum else None
    store = planner.store
    if checksum is not None and store.find(Agent(digest=checksum).key()) is not None:
        return LockedAgent(checksum, pinned_url), 0
    url = agent.agent_url(spec, image.source.platform.split("/")[1])
    assert url is not None
    if planner.offline:
        message = f"the agent would have to be downloaded from {without_secrets(url)}, which --offline forbids"
        raise OfflineError(message, where=f"{image.file}: agent")
    with store.staging(key) as folder:
        try:
            digest, found_at = _download(url, pinned_url, checksum, folder / DATA)
        except AgentError as error:
            if pinned is not None and spec.checksum is None and error.hint:
                hint = "the release was replaced since it was pinned: `fledge lock --update` accepts the new one"
                raise AgentError(error.message, where=error.where, hint=hint) from None
            raise
        record = Agent(digest=digest)
        with store.building(record.key()):
            found = store.find(record.key())
            size = 0 if found else store.publish(record.text(), record.stage(), folder).size
            return LockedAgent(digest, found_at), size


def _download(url: str, pinned_url: str | None, checksum: str | None, into: Path) -> tuple[Digest, str | None]:
    """Get an agent, first from where it was when it was pinned; return its digest, and where it will be."""
    progress = meter()
    if pinned_url is not None:
        with contextlib.suppress(AgentError):
            return download(pinned_url, into, checksum=checksum, advance=progress.add), pinned_url
    redirects: list[str] = []
    digest = download(url, into, checksum=checksum, advance=progress.add, redirected=redirects.append)
    return digest, agent.lasting_url(url, redirects)


def created(config: Mapping[str, object]) -> int:
    """Return the config's creation time in seconds, 0 when it has none or one before 1970."""
    match = _CREATED.fullmatch(str(config.get("created")))
    if match is None:
        return 0
    try:
        seconds = int(datetime.datetime.fromisoformat(match[1] + match[2].replace("Z", "+00:00")).timestamp())
    except (ValueError, OverflowError):
        return 0
    return min(max(seconds, 0), (1 << 32) - 1)
