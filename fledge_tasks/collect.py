"""Taking entries out of the store that nobody needs: by size, by age, or all that is not reached.

What stays, whatever the limits: entries that a running build holds (`leases`), and entries that a
lock file reaches. That is, for the workspace at hand, all that its images are made of now; for
other workspaces that built with this cache and whose lock files are still there, what the index
notes of their images (`usage`), as far as the lock file still has them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fledge_tasks import usage, userns
from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import Digest, is_digest
from fledge_tasks.errors import FledgeError, LockError, StoreError
from fledge_tasks.fsutil import allocated_bytes, crash_point, remove_tree
from fledge_tasks.lock import LockFile
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store

_STALE_SECONDS = 86_400


@dataclass(frozen=True)
class Candidate:
    """An entry: its stage, "" when its record is damaged, apparent and allocated bytes, and when it was last used."""

    key: Digest
    stage: str
    size: int
    allocated: int
    used: int


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be, and what stays; both in the order of last use."""

    removed: list[Candidate]
    kept: list[Candidate]
    reached: frozenset[Digest]
    held: frozenset[Digest] = field(default_factory=frozenset)


def candidates(store: Store) -> list[Candidate]:
    """Return all entries of the store, least recently used first. What was used in the future is used now.

    The clock was set back since: it must neither come last for ever, nor first.
    """
    used, now = store.used(), int(time.time())
    found = []
    for key in store.all_keys():
        entry, folder = store.look(key), store.folder(key)
        try:
            when = min(used.get(key) or int(folder.stat().st_mtime), now)
            allocated = allocated_bytes(folder)
        except OSError:
            continue  # somebody has just removed it
        found.append(Candidate(key, entry.stage if entry else "", entry.size if entry else 0, allocated, when))
    return sorted(found, key=lambda each: (each.used, each.key))


def needed(planner: Planner, images: Iterable[ImageConfig]) -> dict[Digest, set[str]]:
    """Return the keys of all that images of a workspace are made of, each with the images that need it.

    Of an image that has no plan, since a mapped file is missing for example, what it was last made
    of counts. Raises LockError when the lock file cannot be read: what must stay is not known then.
    """
    users: dict[Digest, set[str]] = {}
    for image in images:
        try:
            plan = planner.plan(image)
        except LockError:
            raise
        except FledgeError:
            plan = None
        made = None if plan else usage.made_image(planner, image)
        for key in plan.keys if plan else made.all_keys() if made else ():
            users.setdefault(key, set()).add(f"{planner.workspace.lock}:{image.name}")
    return users


def reached(store: Store, planner: Planner | None) -> dict[Digest, set[str]]:
    """Return the keys that lock files reach, each with the images ('<lock file>:<name>') that need it.

    Raises LockError as `needed`.
    """
    users = needed(planner, planner.workspace.images) if planner else {}
    own = planner.workspace.lock if planner else None
    locks: dict[Path, set[str]] = {}
    for name, made in usage.made_images(store.index).items():
        path = usage.lock_path(name)
        if path == own:
            continue
        if path not in locks:
            locks[path] = _locked_names(path)
        if locks[path].issuperset(made.lock):
            for key in made.all_keys():
                users.setdefault(key, set()).add(name)
    return users


def _locked_names(path: Path) -> set[str]:
    try:
        content = LockFile(path).read()
    except FledgeError:
        return set()
    return {*content.images, *content.agents}


def collect(
    store: Store,
    planner: Planner | None,
    *,
    max_bytes: int | None = None,
    max_age_seconds: int | None = None,
    only_reached: bool = False,
    only_own: bool = False,
    dry_run: bool = False,
) -> Collected:
    """Remove entries, least recently used first, until no limit is exceeded or only protected ones are left.

    `max_bytes` limits what all entries take on the disk, `max_age_seconds` the time since the last
    use; `only_reached` removes all that no lock file reaches, `only_own` also what only other
    workspaces need. Each entry goes by one rename; a crash leaves folders in tmp/, which the next
    call deletes. Also deletes what was set aside as damaged, and work that its builder left unfinished.
    Safe while others build. Raises LockError, StoreError.
    """
    users = needed(planner, planner.workspace.images) if planner and only_own else reached(store, planner)
    now = time.time()
    try:
        with store.leases.frozen() as held:
            every = candidates(store)
            total = sum(each.allocated for each in every)
            removed: list[Candidate] = []
            kept: list[Candidate] = []
            for each in every:
                is_over = (
                    only_reached
                    or (max_age_seconds is not None and now - each.used > max_age_seconds)
                    or (max_bytes is not None and total > max_bytes)
                )
                if is_over and each.key not in users and each.key not in held:
                    removed.append(each)
                    total -= each.allocated
                else:
                    kept.append(each)
            folders = [] if dry_run else store.retire(each.key for each in removed)
        for folder in folders:
            remove_tree(folder)
            crash_point("retired: deleted")
        if not dry_run:
            _tidy(store, now)
            store.forget(each.key for each in removed)
            with store.index.together():
                for key in [key for key, when in store.used().items() if when > now]:
                    store.touch(key)
    except OSError as error:
        raise StoreError(f"cannot be cleaned up: {error.strerror}", where=str(error.filename or store.root)) from None
    return Collected(removed, kept, frozenset(users), held)


def leave_only_content(store: Store) -> None:
    """Remove what a saved cache is better without: locks, leases, unfinished work. Nothing may be building."""
    for name in ("tmp", "locks", "leases"):
        userns.remove_tree(store.root / name)


def _tidy(store: Store, now: float) -> None:
    remove_tree(store.root / "aside")
    temp = store.root / "tmp"
    if not temp.is_dir():
        return
    store.sweep()
    for path in temp.iterdir():
        if is_digest(f"sha256:{path.name.partition('.')[0]}"):
            continue  # somebody is at it
        # What bears no key has no lock that would tell.
        if path.name.startswith("retired-") or now - path.stat().st_mtime > _STALE_SECONDS:
            remove_tree(path)
            crash_point("tidied")
