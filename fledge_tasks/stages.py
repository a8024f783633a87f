"""The work of each stage: from valid entries of the store to new ones, or to the image's files.

Each function can be called at any time and by any number of processes: it takes the lock of what
it makes, looks again whether that is there by now, and publishes it whole. After an error what it
would have made is absent. The values returned are counters for people:

    {"bytes": what was made or moved, "status": "hit" when there was nothing to do}

The stage 'resolve' has a module of its own.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fledge_tasks import agent, collector, fsutil, hash_tree, manifest, mappings, output, qcow2
from fledge_tasks.assemble import Assembled
from fledge_tasks.assemble import assemble as assemble_image
from fledge_tasks.digest import Digest, sha256_bytes, sha256_file, short
from fledge_tasks.errors import BlobError, FledgeError, StoreError
from fledge_tasks.filesystems import backend, possible, skeleton
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.parameters import Parameters
from fledge_tasks.filesystems.sizing import MIB, Wanted
from fledge_tasks.fresh import description, is_assembled, is_fetched
from fledge_tasks.keys import Stage
from fledge_tasks.oci import source
from fledge_tasks.oci.layer import unpack as unpack_layer
from fledge_tasks.oci.layer_index import BLOCK_BYTES, IndexWriter, read_index
from fledge_tasks.oci.manifest import parse_config
from fledge_tasks.oci.payload import PayloadWriter
from fledge_tasks.plan import ImagePlan, Layer, Planner
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

    "fetched" in the values maps diff IDs to bytes: one connection serves all layers of an image.
    """
    store = planner.store
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.building(layer.blob.key()))
        if is_fetched(store, layer):
            return HIT
        # Never wait for a second lock while holding one: whoever has it brings that layer.
        others = {each.ref.blob: each for each in plan.layers if each.ref.blob != layer.ref.blob}
        wanted = [layer]
        wanted += [
            other
            for other in others.values()
            if not is_fetched(store, other)
            and stack.enter_context(store.building_if_free(other.blob.key()))
            and not is_fetched(store, other)
        ]
        progress = meter(sum(each.ref.size for each in wanted))
        with store.staging(layer.blob.key()) as scratch:
            into = scratch / "into"
            into.mkdir()

            def get(layers: Sequence[Layer]) -> None:
                source.fetch(
                    plan.reference,
                    plan.locked.image,
                    [each.ref for each in layers],
                    folder=plan.image.folder,
                    into=into,
                    scratch=scratch,
                    advance=progress.add,
                    offline=planner.offline,
                )

            try:
                get(wanted)
            except BlobError:
                # If it is another layer's blob, that layer's own task is to fail, and no other.
                if not _blob_file(layer, into).exists():
                    get([layer])
            whole = [each for each in wanted if _blob_file(each, into).exists()]
            fetched = {each.ref.diff_id: _publish_blob(store, each, into) for each in whole}
    return {"bytes": fetched[layer.ref.diff_id], "fetched": fetched}


def keep_blob(store: Store, layer: Layer, into: Path) -> int:
    """Publish a checked blob out of the folder `into`, and return its bytes, 0 if it was there."""
    with store.building(layer.blob.key()):
        return 0 if is_fetched(store, layer) else _publish_blob(store, layer, into)


def _blob_file(layer: Layer, into: Path) -> Path:
    return into / layer.ref.blob.removeprefix("sha256:")


def _publish_blob(store: Store, layer: Layer, into: Path) -> int:
    with store.staging(layer.blob.key()) as folder:
        fsutil.move(_blob_file(layer, into), folder / BLOB)
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
            raise _gone(f"the blob of layer {short(layer.ref.diff_id)}")
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
                _drop_blob(store, layer)  # else the next build would meet it again
                raise
            index.flush()
            info = {"entries": unpacked.entries, "tar_bytes": unpacked.tar_bytes, "fetch_seconds": blob.seconds}
            entry = _publish(store, layer.unpack, folder, info=info, known={PAYLOAD: unpacked.payload_xxh3})
        _drop_blob(store, layer)
    return {"bytes": entry.size}


def _drop_blob(store: Store, layer: Layer) -> None:
    """Remove the blob of a layer, unless somebody is just fetching it."""
    key = layer.blob.key()
    if store.folder(key).exists():
        with store.building_if_free(key) as is_free:
            if is_free:
                store.discard(key)


# --- mkfs ------------------------------------------------------------------------------------


def mkfs(planner: Planner, plan: ImagePlan) -> Values:
    """Merge all layers and the customization, and make the filesystem without its file data."""
    store, key = planner.store, plan.mkfs.key()
    with store.building(key), collector.paused():
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
        raise _gone("the customization")
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
            raise _gone(f"layer {short(layer.ref.diff_id)}")
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
            raise _gone("the OCI config")
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
        raise _gone("the agent")
    return entry.file(DATA)


def _size(path: Path) -> int:
    return path.stat().st_size


# --- assemble --------------------------------------------------------------------------------


def assemble(planner: Planner, plan: ImagePlan) -> Values:
    """Put the image file together from the filesystem and the payloads."""
    store, key = planner.store, plan.assemble.key()
    with output.writing(store, plan.output):
        written = output.look(plan.output, key)
        if isinstance(written, output.Written):
            return {**HIT, "sha256": written.sha256}
        made = store.find(plan.mkfs.key())
        if made is None:
            raise _gone("the filesystem")
        sources = sources_of(store, plan)
        image_map = skeleton.read_map(made.file(MAP))
        started = time.monotonic()
        progress = meter(sum(extent.count for extent in image_map.extents) * BLOCK_BYTES)
        put = partial(
            assemble_image,
            image_map,
            made.file(SKELETON),
            payloads_of(sources),
            preallocate=plan.assemble.preallocate,
            advance=progress.add,
        )
        with _writing(plan.output):
            assembled, checksum = _publish_disk(plan, put)
            seconds, is_raw = time.monotonic() - started, plan.assemble.format is None
            output.remember(plan.output, key, checksum, seconds, raw_sha256=None if is_raw else assembled.sha256)
        with store.index.together():
            for entry in (*sources, made):
                store.touch(entry.key)
        for layer in plan.layers:
            _drop_blob(store, layer)  # one that a crash after unpacking left, or that was fetched beside it
    return {
        "bytes": assembled.size,
        "sha256": checksum,
        "shared_bytes": assembled.shared_bytes,
        "copied_bytes": assembled.copied_bytes,
    }


def _publish_disk(plan: ImagePlan, put: Callable[..., Assembled]) -> tuple[Assembled, Digest]:
    """Have `put` write the raw image to its place, or to where a qcow2 is made of it, and return that file's digest."""
    if plan.assemble.format is None:
        assembled = put(plan.output)
        return assembled, assembled.sha256
    with fsutil.replacing_by_programs(plan.output) as folder:
        raw, made = folder / "raw", folder / plan.output.name
        assembled = put(raw, durable=False)
        qcow2.convert(raw, made, plan.assemble.compression)
        checksum = sha256_file(made)
    return assembled, checksum


# --- verity ----------------------------------------------------------------------------------


def make_hash_tree(planner: Planner, plan: ImagePlan) -> Values:
    """Make the hash tree of the image file beside it."""
    with output.writing(planner.store, plan.output):
        image = is_assembled(plan)
        if isinstance(image, str):
            raise StoreError(f"{image} any more", where=str(plan.output), hint="run again")
        record = plan.verity(image.raw_checksum)
        if isinstance(output.look(plan.tree_output, record.key()), output.Written):
            return HIT
        started = time.monotonic()
        with _writing(plan.tree_output):
            with fsutil.replacing_by_programs(plan.tree_output) as folder:
                raw, tree = plan.output, folder / plan.tree_output.name
                if plan.assemble.format is not None:
                    raw = folder / "raw"
                    qcow2.expand(plan.output, raw)
                root_hash = hash_tree.make(raw, tree, salt=record.salt, uuid=record.uuid)
                checksum = sha256_file(tree)
            seconds = time.monotonic() - started
            made = output.remember(plan.tree_output, record.key(), checksum, seconds, root_hash=root_hash)
    return {"bytes": made.size}


# --- manifest --------------------------------------------------------------------------------


def write_manifest(planner: Planner, plan: ImagePlan) -> Values:
    """Write the manifest of the image file beside it."""
    store = planner.store
    with output.writing(store, plan.output):
        record = description(plan)
        if isinstance(record, str):
            raise StoreError(f"{record} any more", where=str(plan.output), hint="run again")
        if isinstance(output.look(plan.manifest_output, record.key()), output.Written):
            return HIT
        config = store.find(plan.config.key())
        if config is None:
            raise _gone("the OCI config")
        try:
            data = manifest.render(
                plan.image.manifest,
                parse_config(config.file(DATA).read_bytes(), where=f"{plan.image.name}: OCI config"),
                name=plan.image.name,
                image=record.image,
                image_digest=record.image_digest,
                rootfs=plan.output,
                checksum=record.checksum,
                filesystem=record.filesystem,
                disk_format=record.format or "raw",
                labels=record.labels,
            )
        except FledgeError:
            output.remove(plan.manifest_output)  # it describes the image that was here before
            raise
        with _writing(plan.manifest_output):
            _remove_others(planner, plan)  # first: what is left of a crash here is looked at again
            fsutil.remove_stale(plan.manifest_output)
            fsutil.write_atomic(plan.manifest_output, data)
            output.remember(plan.manifest_output, record.key(), sha256_bytes(data))
    return {"bytes": len(data)}


def _remove_others(planner: Planner, plan: ImagePlan) -> None:
    """Remove what earlier builds made of the image in a form that is not asked for any more."""
    for path in planner.workspace.outputs(plan.image) - set(plan.published):
        fsutil.remove_stale(path)
        if output.key_of(path) is not None:
            output.remove(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fsutil.explained(error, path) from None


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


def _gone(what: str) -> StoreError:
    return StoreError(f"{what} is not in the cache any more", hint="something cleaned it meanwhile: run again")
