"""The content store: what was built, by the key of what it was built from.

    <cache>/
        CACHEDIR.TAG                    tells backup programs to pass over it
        objects/<2 digits>/<key>/       an entry: its files, and
            entry.json                  its record, written last: without it there is no entry
        tmp/<key>.<random>/             entries being built; whoever builds a key removes its old ones
        locks/<key>                     held (flock) while a key is being built
        aside/<key>/                    the last entry of that key that was found damaged
        leases/                         see leases.py
        index/                          see index.py

    entry.json = {"format": 1, "stage", "key_text", "files": {name: [size, XXH3-128]}, "info": {…}, "seconds"}

Version history: 1 first version.

The store is the truth: 'up to date' means that it holds a valid entry. An entry is published by
one rename, so it is whole or absent. It is checked before it is used: record, sizes, and the
XXH3-128 of every file, unless stat says that the file is still the one that was checked. What
fails is set aside and is a miss, never an error and never an input. The folder can be moved,
archived and restored with other times; every file is then checked again once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import msgspec

from fledge_tasks import fsutil, userns
from fledge_tasks.digest import Digest, is_digest, sha256_bytes, short, xxh3_file
from fledge_tasks.errors import NOT_DECODED, StoreError
from fledge_tasks.index import Index, signature
from fledge_tasks.leases import Leases
from fledge_tasks.notices import Notices

FORMAT = 1
RECORD = "entry.json"
_FILE_NAME = re.compile(r"[a-z][a-z.]{0,31}")
_NO_RECORD = "its record is missing, damaged, or of another version"
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder holds a fledge-tasks cache. See https://bford.info/cachedir/\n"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """entry.json."""

    format: int
    stage: str
    key_text: str
    files: dict[str, tuple[int, str]]
    info: dict[str, Any]
    seconds: float

    def misfit(self, folder: Path) -> str | None:
        """Return why the files in a folder are not the ones of this record, None if they are. Reads every byte."""
        reasons = (_misfit(folder / name, size, checksum) for name, (size, checksum) in self.files.items())
        return next((reason for reason in reasons if reason), None)


def _misfit(path: Path, size: int, checksum: str) -> str | None:
    """Return in what a file is not the one of this size and XXH3-128, None if it is. Reads every byte."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes, not {size}"
        if (found_checksum := xxh3_file(path)) != checksum:
            return f"{path.name} has the XXH3 {found_checksum}, not {checksum}"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def parse_record(data: bytes, key: Digest) -> Record | None:
    """Return the record of an entry, None if these bytes are not one of that key, or name what no entry holds."""
    try:
        record = msgspec.json.decode(data, type=Record)
    except NOT_DECODED:
        return None
    # Names are joined to the entry's folder: what leads out of it would be read there, and made read-only.
    if record.format != FORMAT or RECORD in record.files or not all(map(_FILE_NAME.fullmatch, record.files)):
        return None
    return record if sha256_bytes(record.key_text.encode()) == key else None


@dataclass(frozen=True)
class Entry:
    """A valid entry. `info` is what its builder wanted to be known beside the files, `seconds` what it took."""

    key: Digest
    folder: Path
    stage: str
    key_text: str
    info: Mapping[str, Any]
    size: int
    seconds: float

    @property
    def cost_seconds(self) -> float:
        """What it takes to have it again, fetching what it was made from included."""
        return self.seconds + float(self.info.get("fetch_seconds", 0.0))

    def file(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.folder / name


class Store:
    """The store in one cache folder. Safe to use from any number of processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.leases = Leases(self.root / "leases")
        self.notices = Notices()
        self.index = Index(self.root / "index", self.notices.add)
        self._started: dict[Path, float] = {}

    def prepare(self) -> None:
        """Make the folder if it is not there. Idempotent. Raises StoreError."""
        try:
            for name in ("objects", "tmp", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            tag = self.root / "CACHEDIR.TAG"
            # In place, since many processes may do it at once; half a tag is written again by the next.
            if not tag.exists() or tag.stat().st_size < len(_TAG):
                tag.write_text(_TAG)
                fsutil.crash_point("prepared")
        except OSError as error:
            raise _explained(error, self.root) from None

    def close(self) -> None:
        """Let go of what this process holds, and write the index into its one file."""
        self.leases.release()
        self.index.close()

    @property
    def is_read_only(self) -> bool:
        """Tell whether the folder is there and this process may not write to it."""
        locks = self.root / "locks"
        return (self.root / "objects").is_dir() and not os.access(locks if locks.is_dir() else self.root, os.W_OK)

    def find(self, key: Digest) -> Entry | None:
        """Return the entry of a key if it is there and valid. Never raises for a bad entry."""
        folder = self.folder(key)
        try:
            seen = folder.stat().st_ino
        except OSError:
            return None
        record = self._read(key)
        if record is None:
            reason: str | None = _NO_RECORD
        else:
            reasons = (self._misfit(key, folder / name, *facts) for name, facts in record.files.items())
            reason = next((reason for reason in reasons if reason), None)
        if record is None or reason:
            self._set_aside(key, seen, f"{record.stage if record else 'entry'} {short(key)}: {reason}")
            return None
        return _entry(key, folder, record)

    def look(self, key: Digest) -> Entry | None:
        """Return what the record of an entry says, without a look at its files. Never raises."""
        record = self._read(key)
        return _entry(key, self.folder(key), record) if record else None

    def all_keys(self) -> list[Digest]:
        """Return the keys of all entries, valid or not, in order."""
        names = (path.name for path in (self.root / "objects").glob("??/*"))
        return sorted(key for name in names if is_digest(key := Digest(f"sha256:{name}")))

    def damage(self, key: Digest) -> str | None:
        """Return what is wrong with an entry, None if it is whole. Reads every byte, whatever is remembered of it."""
        record = self._read(key)
        return record.misfit(self.folder(key)) if record else _NO_RECORD

    def _read(self, key: Digest) -> Record | None:
        try:
            return parse_record((self.folder(key) / RECORD).read_bytes(), key)
        except OSError:
            return None

    def touch(self, key: Digest) -> None:
        """Remember that the entry was used now."""
        self.index.set(f"used:{_hex(key)}", int(time.time()))

    @contextlib.contextmanager
    def building(self, key: Digest) -> Iterator[None]:
        """Hold the lock of a key: one builder at a time, across processes.

        The caller looks with `find` again inside. The lock dies with its process.
        """
        self.prepare()
        # Not deleted afterwards: a second process may already wait on the same file.
        try:
            lock = filelock.FileLock(self.root / "locks" / _hex(key), thread_local=False)
            with lock:
                fsutil.crash_point("locked")
                self._remove_unfinished(key)
                yield
        except OSError as error:
            raise _explained(error, self.root) from None

    @contextlib.contextmanager
    def building_if_free(self, key: Digest) -> Iterator[bool]:
        """Like `building`, but do not wait: the value tells whether the lock was free."""
        self.prepare()
        lock = filelock.FileLock(self.root / "locks" / _hex(key), thread_local=False)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        try:
            self._remove_unfinished(key)
            yield True
        finally:
            lock.release()

    def hold(self, keys: Iterable[Digest]) -> None:
        """Keep the entries of these keys, see `leases`. The first time, delete what crashed builders left, too."""
        if not self.leases.is_held:
            with contextlib.suppress(OSError, StoreError):  # of a cache that is read-only, or not there
                self.sweep()
        self.leases.hold(keys)

    def sweep(self) -> None:
        """Delete unfinished work whose builder is gone. Raises OSError, StoreError."""
        for path in (self.root / "tmp").iterdir():
            if is_digest(key := Digest(f"sha256:{path.name.partition('.')[0]}")):
                with self.building_if_free(key):
                    pass  # with the lock, what is left is gone
                fsutil.crash_point("swept")

    @contextlib.contextmanager
    def staging(self, key: Digest) -> Iterator[Path]:
        """Yield a new folder inside the store for the files of a key; it is gone afterwards."""
        folder = fsutil.temp_name(self.root / "tmp", _hex(key))
        try:
            folder.mkdir(parents=True)
            self._started[folder] = time.monotonic()
            fsutil.crash_point("staging: made")
            yield folder
        finally:
            self._started.pop(folder, None)
            userns.remove_tree(folder)

    def _remove_unfinished(self, key: Digest) -> None:
        """Delete what builders of a key that are gone left. The caller holds its lock."""
        for folder in fsutil.stale_below(self.root / "tmp", _hex(key)):
            userns.remove_tree(folder)

    def publish(
        self,
        key_text: str,
        stage: str,
        folder: Path,
        *,
        info: Mapping[str, Any] | None = None,
        known: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> Entry:
        """Make an entry of the files in a staging folder, durably and at once.

        `known` holds the XXH3-128 of files that were hashed while they were written. Without
        `durable` the entry's files may be damaged by a power failure, which is then found out. The
        caller holds the lock of the key. Raises StoreError; nothing is published then.
        """
        seconds = round(time.monotonic() - self._started.get(folder, time.monotonic()), 3)
        try:
            files: dict[str, tuple[int, str]] = {}
            for path in sorted(folder.iterdir()):
                files[path.name] = (path.stat().st_size, (known or {}).get(path.name) or xxh3_file(path))
        except OSError as error:
            raise _explained(error, self.root) from None
        record = Record(FORMAT, stage, key_text, files, dict(info or {}), seconds)
        return self.publish_record(record, folder, durable=durable)

    def publish_record(self, record: Record, folder: Path, *, durable: bool = True) -> Entry:
        """Make an entry of a record and a staging folder that holds its files, as `publish` does."""
        key = sha256_bytes(record.key_text.encode())
        target = self.folder(key)
        self.leases.hold([key])  # before it is there: what was just made is about to be used
        try:
            for name in record.files:
                if durable:
                    fsutil.sync_file(folder / name)
                (folder / name).chmod(0o444)
            fsutil.crash_point(f"publish {record.stage}: files synced")
            (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
            fsutil.sync_file(folder / RECORD)
            fsutil.crash_point(f"publish {record.stage}: record synced")
            if target.exists():
                shutil.rmtree(target)
            fsutil.publish_folder(folder, target, record.stage)
            with self.index.together():
                for name, (_, checksum) in record.files.items():
                    self._remember(key, target / name, checksum)
                self.touch(key)
            fsutil.crash_point(f"publish {record.stage}: remembered")
        except OSError as error:
            raise _explained(error, self.root) from None
        return _entry(key, target, record)

    def used(self) -> dict[Digest, int]:
        """Return when entries were last used, in seconds since the epoch, as far as that is remembered."""
        times = self.index.items("used")
        return {Digest(f"sha256:{name}"): value for name, value in times.items() if isinstance(value, int)}

    def retire(self, keys: Iterable[Digest]) -> list[Path]:
        """Take entries out of the store, each by one rename; return the folders that are left to be deleted.

        The caller sees to it that nobody uses them: see `leases`. Raises OSError.
        """
        retired = []
        for key in keys:
            target = fsutil.temp_name(self.root / "tmp", f"retired-{_hex(key)}")
            fsutil.move(self.folder(key), target)
            fsutil.crash_point("retire: renamed")
            retired.append(target)
        return retired

    def forget(self, keys: Iterable[Digest]) -> None:
        """Drop what the index remembers of entries that are gone."""
        gone = {_hex(key) for key in keys}
        with self.index.together():
            for name in self.index.names():
                kind, _, rest = name.partition(":")
                if kind in {"used", "object"} and rest.partition("/")[0] in gone:
                    self.index.remove(name)

    def discard(self, key: Digest) -> None:
        """Remove an entry that is not needed any more. Idempotent; the caller holds its lock.

        A signal is raised when it is gone.
        """
        # By one rename: whoever looks at it now finds it whole or not at all, and never takes it for damaged.
        folder = fsutil.temp_name(self.root / "tmp", _hex(key))
        try:
            fsutil.move(self.folder(key), folder)
            fsutil.crash_point("discard: renamed")
        except OSError:
            return
        finally:
            fsutil.remove_tree(folder)
        fsutil.crash_point("discard: folder deleted")

    def folder(self, key: Digest) -> Path:
        """Return where the entry of a key is, or would be."""
        name = _hex(key)
        return self.root / "objects" / name[:2] / name

    def _misfit(self, key: Digest, path: Path, size: int, checksum: str) -> str | None:
        """Like the function, but do not read a file that is still the one that was checked."""
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_size == size and self.index.get(_memo_name(key, path)) == [*signature(status), checksum]:
                return None
        reason = _misfit(path, size, checksum)
        if reason is None:
            with contextlib.suppress(OSError):
                self._remember(key, path, checksum)
        return reason

    def _remember(self, key: Digest, path: Path, checksum: str) -> None:
        # Trusted at once, unlike other people's files: nobody writes to an entry after its rename.
        self.index.set(_memo_name(key, path), [*signature(path.stat()), checksum])

    def set_aside(self, key: Digest) -> None:
        """Take a damaged entry out of the store, and keep it in `aside` until the next one or a clean-up."""
        with contextlib.suppress(OSError):
            self._set_aside(key, self.folder(key).stat().st_ino)

    def _set_aside(self, key: Digest, seen: int, damage: str | None = None) -> None:
        folder = self.folder(key)
        try:
            # Somebody else may have found the damage first, and may have built the entry anew by now.
            if folder.stat().st_ino != seen:
                return
            fsutil.set_aside(folder, self.root / "aside" / _hex(key))
            done = "set aside, to be made again when it is needed"
        except FileNotFoundError:
            return
        except OSError as error:
            done = f"not used; it cannot be set aside: {error.strerror}"
        if damage:
            self.notices.add(f"damaged: {damage}; {done}")


def _entry(key: Digest, folder: Path, record: Record) -> Entry:
    size = sum(size for size, _ in record.files.values())
    return Entry(key, folder, record.stage, record.key_text, record.info, size, record.seconds)


def _hex(key: Digest) -> str:
    return key.removeprefix("sha256:")


def _memo_name(key: Digest, path: Path) -> str:
    return f"object:{_hex(key)}/{path.name}"


def _explained(error: OSError, root: Path) -> StoreError:
    return fsutil.explained(error, root, elsewhere="set FLEDGE_CACHE_DIR to a folder")
