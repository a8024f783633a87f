"""The stages that write an image's files to the build folder: assemble, verity, manifest.

Each function can be called at any time and by any number of processes: it takes the lock of the
image, looks whether its file is there by now, and publishes it whole. After an error the file is
what it was before, but for a manifest that cannot be: one that describes another image is removed.
The values returned are those of `stages`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fledge_tasks import fsutil, hash_tree, manifest, output, qcow2
from fledge_tasks.assemble import Assembled
from fledge_tasks.assemble import assemble as assemble_image
from fledge_tasks.digest import Digest, sha256_bytes, sha256_file
from fledge_tasks.errors import FledgeError, StoreError
from fledge_tasks.filesystems import skeleton
from fledge_tasks.fresh import description, is_assembled
from fledge_tasks.oci.layer_index import BLOCK_BYTES
from fledge_tasks.oci.manifest import parse_config
from fledge_tasks.plan import ImagePlan
from fledge_tasks.planner import Planner
from fledge_tasks.progress import meter
from fledge_tasks.stages import DATA, HIT, MAP, SKELETON, Values, drop_blob, gone, payloads_of, sources_of

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
            raise gone("the filesystem")
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
            drop_blob(store, layer)  # one that a crash after unpacking left, or that was fetched beside it
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
            raise gone("the OCI config")
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
