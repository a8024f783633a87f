"""The stages that fill the store: fetch, unpack, mkfs. From valid entries to new ones.

Each function can be called at any time and by any number of processes: it takes the lock of what
it makes, looks again whether that is there by now, and publishes it whole. After an error what it
would have made is absent. The values returned are counters for people:

    {"bytes": what was made or moved, "status": "hit" when there was nothing to do}

The stages that write to the build folder are in `results.py`, the one that looks outside in `resolve.py`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge_tasks import agent, collector, fsutil, mappings
from fledge_tasks.digest import short
from fledge_tasks.errors import BlobError, LockError, StoreError
from fledge_tasks.filesystems import backend, possible, skeleton
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.parameters import Parameters
from fledge_tasks.filesystems.sizing import MIB, Wanted
from fledge_tasks.fresh import is_fetched
from fledge_tasks.keys import Stage
from fledge_tasks.oci import source
from fledge_tasks.oci.layer import unpack as unpack_layer
from fledge_tasks.oci.layer_index import IndexWriter, read_index
from fledge_tasks.oci.manifest import LayerRef, diff_ids
from fledge_tasks.oci.payload import PayloadWriter
from fledge_tasks.plan import ImagePlan, Layer
from fledge_tasks.planner import Planner
from fledge_tasks.progress import meter
from fledge_tasks.store import Entry, Store
from fledge_tasks.tree import Inode, merge
from fledge_tasks.tree import Layer as TreeLayer

Values = dict[str, Any]

PAYLOAD, INDEX, BLOB, SKELETON, MAP, DATA = "payload", "index", "blob", "skeleton", "map", "data"
HIT: Values = {"status": "hit", "bytes": 0}


# --- fetch -----------------------------------------------------------------------------------


def fetch(planner: Planner, plan: ImagePlan, layer: Layer) -> Values:
    """Get the blob of a layer, and in the same go those of the image's other layers that are missing.

    Each of those is published when it is there, however long the others need. "fetched" in the values
    maps diff IDs to bytes: one connection serves all layers of an image.
    """
    store = planner.store
    wanted, fetched = {layer.ref.blob: layer}, dict[str, int]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.building(layer.blob.key()))
        if is_fetched(store, layer):
            return HIT
        # Never wait for a second lock while holding one: whoever has it brings that layer.
        locks = {other.ref.blob: stack.enter_context(contextlib.ExitStack()) for other in plan.layers}
        for other in plan.layers:
            if other.ref.blob in wanted or is_fetched(store, other):
                continue
            lock = locks[other.ref.blob]
            if lock.enter_context(store.building_if_free(other.blob.key())) and not is_fetched(store, other):
                wanted[other.ref.blob] = other
            else:
                lock.close()  # somebody has brought it just now, and may want to drop it
        progress = meter(sum(each.ref.size for each in wanted.values()))
        with store.staging(layer.blob.key()) as scratch:
            into = scratch / "into"
            into.mkdir()

            def keep(ref: LayerRef) -> None:
                each = wanted[ref.blob]
                fetched[each.ref.diff_id] = _publish_blob(store, each, into)
                locks[ref.blob].close()  # so that it is unpacked, and dropped, while others are on their way

            def get(layers: Iterable[Layer]) -> None:
                source.fetch(
                    plan.reference,
                    plan.locked.image,
                    [each.ref for each in layers],
                    folder=plan.image.folder,
                    into=into,
                    scratch=scratch,
                    advance=progress.add,
                    arrived=keep,
                    offline=planner.offline,
                )

            try:
                get(wanted.values())
            except BlobError:
                # If it is another layer's blob, that layer's own task is to fail, and no other.
                if layer.ref.diff_id not in fetched:
                    get([layer])
    return {"bytes": fetched[layer.ref.diff_id], "fetched": fetched}


def keep_blob(store: Store, layer: Layer, into: Path) -> int:
    """Publish a checked blob out of the folder `into`, and return its bytes, 0 if it was there."""
    with store.building(layer.blob.key()):
        return 0 if is_fetched(store, layer) else _publish_blob(store, layer, into)


def _publish_blob(store: Store, layer: Layer, into: Path) -> int:
    with store.staging(layer.blob.key()) as folder:
        fsutil.move(into / layer.ref.blob.removeprefix("sha256:"), folder / BLOB)
        # Not synced: it is read once, soon, and checked against its digest then.
        return _publish(store, layer.blob, folder, durable=False).size


# --- unpack ----------------------------------------------------------------------------------


def unpack(planner: Planner, plan: ImagePlan, layer: Layer) -> Values:
    """Turn the blob of a layer into payload and index, and drop the blob."""
    store, key = planner.store, layer.unpack_key
    with store.building(key):
        if store.find(key) is not None:
            return HIT
        blob = store.find(layer.blob.key())
        if blob is None:
            raise gone(f"the blob of layer {short(layer.ref.diff_id)}")
        progress = meter(layer.ref.size)
        with (
            store.staging(key) as folder,
            blob.file(BLOB).open("rb", buffering=0) as compressed,
            (folder / PAYLOAD).open("wb", buffering=0) as payload,
            (folder / INDEX).open("wb") as index,
        ):
            try:
                unpacked = unpack_layer(
                    compressed,
                    diff_id=layer.ref.diff_id,
                    blob_digest=layer.ref.blob,
                    blob_size=layer.ref.size,
                    limits=planner.limits,
                    payload_fd=payload.fileno(),
                    index_file=index,
                    advance=progress.add,
                    where=f"{plan.image.name}: layer {short(layer.ref.diff_id)}",
                )
            except BlobError:
                drop_blob(store, layer)  # else the next build would meet it again
                raise
            index.flush()
            info = {"entries": unpacked.entries, "tar_bytes": unpacked.tar_bytes, "fetch_seconds": blob.seconds}
            entry = _publish(store, layer.unpack, folder, info=info, known={PAYLOAD: unpacked.payload_xxh3})
        drop_blob(store, layer)
    return {"bytes": entry.size}


def drop_blob(store: Store, layer: Layer) -> None:
    """Remove the blob of a layer, unless somebody is just fetching it."""
    key = layer.blob.key()
    if store.folder(key).exists():
        with store.building_if_free(key) as is_free:
            if is_free:
                store.discard(key)


# --- mkfs ------------------------------------------------------------------------------------


def mkfs(planner: Planner, plan: ImagePlan) -> Values:
    """Merge all layers and the customization, and make the filesystem without its file data. Raises LockError."""
    store, key = planner.store, plan.mkfs.key()
    with store.building(key), collector.paused():
        _check_layers(planner, plan)
        _customize(store, plan)
        if store.find(key) is not None:
            return HIT
        sources = sources_of(store, plan)
        root = merged(plan, sources)
        asked = plan.mkfs.filesystem
        possible.check(asked.type, is_plain=asked.is_plain, compression=asked.compression, index=store.index)
        with store.staging(key) as folder, store.staging(key) as scratch:
            image = scratch / "image"
            filled = backend(plan.mkfs.filesystem.type).make(
                root, _parameters(plan), payloads_of(sources), image, scratch
            )
            made = skeleton.save(image, filled.extents, folder / SKELETON, folder / MAP)
            _say_least(planner, plan, made.image_bytes, filled.free_bytes)
            info = {"image_bytes": made.image_bytes, "free_bytes": filled.free_bytes, "free_inodes": filled.free_inodes}
            entry = _publish(store, plan.mkfs, folder, info=info)
    return {"bytes": entry.size}


def _check_layers(planner: Planner, plan: ImagePlan) -> None:
    """Raise LockError when the lock file has other layers for an image than its config: it would be another image."""
    config = planner.store.find(plan.config.key())
    if config is None:
        return
    found = diff_ids(config.file(DATA).read_bytes(), where=f"{plan.image.name}: OCI config")
    if found != tuple(layer.ref.diff_id for layer in plan.layers):
        raise LockError(
            f"the layers of {planner.lock_name(plan.image)} are not those of its config",
            where=str(planner.workspace.lock),
            hint="if it was edited by hand, run `fledge lock --update`",
        )


def _say_least(planner: Planner, plan: ImagePlan, image_bytes: int, free_bytes: int) -> None:
    """Tell that an image is larger than what it was asked to be, since its type has nothing smaller."""
    asked = plan.mkfs.filesystem
    least = OPTIONS[asked.type].min_mb
    if asked.size_mb is None and image_bytes == least * MIB and free_bytes >= (asked.size_buffer_mb + 1) * MIB:
        planner.store.notices.add(
            f"{plan.image.name}: {least} MiB is the least that {asked.type} takes, so {free_bytes // MIB} MiB are free"
            f" instead of {asked.size_buffer_mb}"
        )


def merged(plan: ImagePlan, sources: Sequence[Entry]) -> Inode:
    """Return the tree of an image, whose `sources` are its unpacked layers and its customization."""
    names = [*(f"{plan.image.name}: layer {short(layer.ref.diff_id)}" for layer in plan.layers), str(plan.image.file)]
    layers = [
        TreeLayer(name, read_index(entry.file(INDEX)), is_customization=entry is sources[-1])
        for name, entry in zip(names, sources, strict=True)
    ]
    return merge(layers, plan.mkfs.epoch * 1_000_000_000)


def sources_of(store: Store, plan: ImagePlan) -> list[Entry]:
    """Return the entries whose payloads an image points into: layers, then customization. Raises StoreError."""
    customization = store.find(plan.customize.key())
    if customization is None:
        raise gone("the customization")
    return [*_unpacked(store, plan), customization]


def payloads_of(sources: Sequence[Entry]) -> dict[int, Path]:
    """Return the payloads of sources by the numbers that trees and maps of extents have for them."""
    return {number: entry.file(PAYLOAD) for number, entry in enumerate(sources)}


def _parameters(plan: ImagePlan) -> Parameters:
    identity, asked = uuid.UUID(plan.mkfs.uuid), plan.mkfs.filesystem
    return Parameters(
        uuid=identity.bytes,
        hash_seed=uuid.uuid5(identity, "hash seed").bytes,
        epoch=plan.mkfs.epoch,
        wanted=Wanted(
            buffer_bytes=asked.size_buffer_mb * MIB,
            size_bytes=None if asked.size_mb is None else asked.size_mb * MIB,
            shrink=asked.shrink,
            inode_ratio=asked.inode_ratio,
        ),
        features=tuple(OPTIONS[asked.type].features(asked.features)),
        label=asked.label,
        block_bytes=asked.block_size,
        compression=asked.compression,
        compression_level=asked.compression_level,
    )


def _unpacked(store: Store, plan: ImagePlan) -> list[Entry]:
    entries = []
    for layer in plan.layers:
        entry = store.find(layer.unpack_key)
        if entry is None:
            raise gone(f"layer {short(layer.ref.diff_id)}")
        entries.append(entry)
    return entries


def _customize(store: Store, plan: ImagePlan) -> None:
    """Make the customization layer if it is not there: OCI config, agent, mappings, in this order."""
    key, epoch_ns = plan.customize.key(), plan.customize.epoch * 1_000_000_000
    with store.building(key):
        if store.find(key) is not None:
            return
        config = store.find(plan.config.key())
        if config is None:
            raise gone("the OCI config")
        with store.staging(key) as folder:
            with (
                (folder / PAYLOAD).open("wb", buffering=0) as payload,
                (folder / INDEX).open("wb") as index,
                PayloadWriter(payload.fileno()) as writer,
            ):
                entries = IndexWriter(index)
                # Each file is checked against its digest while it is copied.
                own, sources = [agent.config_file(plan.config.digest, _size(config.file(DATA)))], {}
                sources[agent.CONFIG_PATH] = config.file(DATA)
                if plan.customize.agent is not None:
                    sources[agent.AGENT_PATH] = path = _agent_file(store, plan)
                    own.append(agent.program(plan.customize.agent, _size(path)))
                for files, paths in ((own, sources), (plan.customize.mapped, plan.sources)):
                    for each in mappings.entries(files, paths, writer, epoch_ns):
                        entries.add(each)
                _, checksum = writer.close()
                entries.close()
            _publish(store, plan.customize, folder, known={PAYLOAD: checksum})


def _agent_file(store: Store, plan: ImagePlan) -> Path:
    if plan.agent_path is not None:
        return plan.agent_path
    entry = store.find(plan.agent.key()) if plan.agent else None
    if entry is None:
        raise gone("the agent")
    return entry.file(DATA)


def _size(path: Path) -> int:
    return path.stat().st_size


def _publish(
    store: Store,
    record: Stage,
    folder: Path,
    *,
    info: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
    durable: bool = True,
) -> Entry:
    return store.publish(record.text(), record.stage(), folder, info=info, known=known, durable=durable)


def gone(what: str) -> StoreError:
    """Return what is raised for an entry that a stage needs and that is not there."""
    return StoreError(f"{what} is not in the cache any more", hint="something cleaned it meanwhile: run again")
