"""What is up to date: each stage's question to the store, the lock file and the output files.

Nothing is built here, and nothing imported that builds: when nothing changed, this is all that runs.
"""

from __future__ import annotations

from fledge_tasks import output
from fledge_tasks.config import ImageConfig
from fledge_tasks.keys import Manifest
from fledge_tasks.manifest import HASH_TREE, RAW_CHECKSUM, ROOT_HASH
from fledge_tasks.plan import ImagePlan, Layer
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store


def is_resolved(planner: Planner, image: ImageConfig) -> bool:
    """Tell whether lock file and store hold all that `resolve` brings."""
    plan = planner.plan(image)
    if plan is None:
        return False
    agent_is_here = plan.agent is None or planner.store.find(plan.agent.key()) is not None
    return agent_is_here and planner.store.find(plan.config.key()) is not None


def is_fetched(store: Store, layer: Layer) -> bool:
    """Tell whether there is nothing to fetch for a layer: it is unpacked, or its blob is there."""
    return is_unpacked(store, layer) or store.find(layer.blob.key()) is not None


def is_unpacked(store: Store, layer: Layer) -> bool:
    """Tell whether the store holds the unpacked layer."""
    return store.find(layer.unpack_key) is not None


def is_made(store: Store, plan: ImagePlan) -> bool:
    """Tell whether the store holds the filesystem and the customization that it points into."""
    return all(store.find(key) is not None for key in (plan.mkfs.key(), plan.customize.key()))


def is_assembled(plan: ImagePlan) -> output.Written | str:
    """Return the record of the image file if it is up to date, else the reason why it is not."""
    return output.look(plan.output, plan.assemble.key())


def expected(plan: ImagePlan) -> output.Written | None:
    """Return the record of the image file that is there, or that comes again because someone touched it."""
    return output.made_from(plan.output, plan.assemble.key())


def is_hashed(plan: ImagePlan, image: output.Written | None = None) -> output.Written | str:
    """Return the record of the image file's hash tree if it is up to date, else the reason why it is not.

    `image` is what is known of the image file, if it is not there.
    """
    assembled = image or is_assembled(plan)
    if isinstance(assembled, str):
        return assembled
    return output.look(plan.tree_output, plan.verity(assembled.raw_checksum).key())


def expected_tree(plan: ImagePlan, image: output.Written) -> output.Written | None:
    """Return the record of the image file's hash tree that is there, or that comes again."""
    return output.made_from(plan.tree_output, plan.verity(image.raw_checksum).key())


def description(
    plan: ImagePlan, image: output.Written | None = None, tree: output.Written | None = None
) -> Manifest | str:
    """Return the record of the manifest that describes the finished files, else the reason why there is none yet.

    `image` and `tree` are what is known of these files, if they are not there.
    """
    assembled = image or is_assembled(plan)
    if isinstance(assembled, str):
        return assembled
    labels = {} if assembled.raw_sha256 is None else {RAW_CHECKSUM: assembled.raw_sha256}
    if plan.image.output.verity:
        hashed = tree or is_hashed(plan, assembled)
        if isinstance(hashed, str):
            return hashed
        labels |= {ROOT_HASH: str(hashed.root_hash), HASH_TREE: str(plan.tree_output)}
    return plan.manifest(assembled.sha256, labels)


def is_described(plan: ImagePlan) -> output.Written | str:
    """Return the record of the manifest if it describes the image file, else the reason why not."""
    return is_written(plan, description(plan))


def is_written(plan: ImagePlan, record: Manifest | str) -> output.Written | str:
    """Return the record of the manifest if it was made from `record`, what `description` returned, else why not."""
    return record if isinstance(record, str) else output.look(plan.manifest_output, record.key())
