"""Makes plans from fledge.toml, the lock file and local files alone.

An image that is not resolved yet, or whose local source is another one than the lock file says, has
no plan until it is resolved. Nothing is built here, and nothing is written but the index.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from fledge_tasks import agent
from fledge_tasks.config import ImageConfig, Output
from fledge_tasks.errors import AgentError, FilesystemError, FledgeError, InputError, LockError, ToolError
from fledge_tasks.filesystems import possible
from fledge_tasks.index import FileDigests
from fledge_tasks.keys import Agent, Assemble, Config, Content, Customize, Mkfs
from fledge_tasks.lock import LockedAgent, LockedImage, LockFile
from fledge_tasks.mappings import MappedFile, expand
from fledge_tasks.oci import reference
from fledge_tasks.oci.limits import Limits
from fledge_tasks.oci.reference import Reference
from fledge_tasks.plan import ImagePlan, Layer, other_format, source_date_epoch
from fledge_tasks.store import Store
from fledge_tasks.tools import QEMU_IMG, VERITYSETUP, Tool
from fledge_tasks.workspace import Workspace


class Planner:
    """Makes the plans of a workspace's images, each once for one state of the lock file."""

    def __init__(self, workspace: Workspace, store: Store, *, locked: bool = False, offline: bool = False) -> None:
        self.workspace = workspace
        self.store = store
        self.locked = locked
        self.offline = offline
        self.lock = LockFile(workspace.lock)
        self.digest_of = FileDigests(store.index)
        self.limits = _limits(workspace)
        self._lock_names: dict[str, str] = {}
        self._makers: dict[tuple[str, str | None], str] = {}
        self._tools: dict[Tool, str] = {}
        self._obstacles: dict[tuple[str, bool, str | None], FilesystemError | None] = {}
        self._plans: dict[str, tuple[LockedImage, LockedAgent | None, ImagePlan]] = {}
        self._identities: dict[str, str | FledgeError | None] = {}
        self._expanded: dict[str, tuple[list[MappedFile], dict[str, Path]]] = {}

    def _maker(self, kind: str, compression: str | None) -> str:
        """Return package and version of what makes a type of filesystem; asked once."""
        key = kind, compression
        if key not in self._makers:
            self._makers[key] = possible.made_by(kind, compression, self.store.index)
        return self._makers[key]

    def _tool(self, tool: Tool) -> str:
        """Return package and version of a program; asked once. Raises ToolError."""
        if tool not in self._tools:
            self._tools[tool] = tool.identity(self.store.index)
        return self._tools[tool]

    def reference(self, image: ImageConfig) -> Reference:
        """Return the parsed reference, which was checked with all of fledge.toml."""
        return reference.parse(image.source.image)

    def lock_name(self, image: ImageConfig) -> str:
        """Return the name of the image's entry in the lock file."""
        name = self._lock_names.get(image.name)
        if name is None:
            found = reference.lock_name(self.reference(image), image.folder, self.workspace.root)
            name = self._lock_names[image.name] = f"{found} {image.source.platform}"
        return name

    def agent_spec(self, image: ImageConfig) -> agent.AgentSpec | None:
        """Return `[agent]` in the form of the module that gets it."""
        if image.agent is None:
            return None
        return agent.AgentSpec(**msgspec.structs.asdict(image.agent))

    def agent_name(self, image: ImageConfig) -> str | None:
        """Return the name of the agent's entry in the lock file; None when it needs none."""
        spec = self.agent_spec(image)
        if spec is None or spec.source_strategy == "local":
            return None
        return agent.lock_name(spec, image.source.platform.split("/")[1])

    def unresolved(self, image: ImageConfig) -> str | None:
        """Return why the image has to be resolved, None if it need not.

        Looks at a local source in every run, once. Raises SourceError when that cannot be done.
        """
        content = self.lock.read()
        entry = content.images.get(self.lock_name(image))
        if entry is None:
            return f"{self.lock_name(image)} is not in {self.workspace.lock.name}"
        name = self.agent_name(image)
        if name is not None and name not in content.agents:
            return f"{name} is not in {self.workspace.lock.name}"
        if name is not None and image.agent and image.agent.checksum not in {None, content.agents[name].digest}:
            return f"agent.checksum is no longer the one in {self.workspace.lock.name}"
        identity = self._identity(image, entry)
        if identity is not None and identity != entry.identity:
            return f"{image.source.image} is another image than {self.workspace.lock.name} says"
        return None

    def _identity(self, image: ImageConfig, entry: LockedImage) -> str | None:
        ref = self.reference(image)
        if entry.image.origin == "docker":
            return None  # pinned until `fledge lock --update`, wherever an untyped reference may be now
        from fledge_tasks.oci import source  # takes its time to import, and pinned images do without

        name = self.lock_name(image)
        if name not in self._identities:
            try:
                self._identities[name] = source.identity(
                    ref, folder=image.folder, platform=image.source.platform, digest_of=self.digest_of
                )
            except FledgeError as error:
                self._identities[name] = error
        found = self._identities[name]
        if isinstance(found, FledgeError):
            if self.locked or self.offline:
                return None  # the lock file decides, and the store may have it all
            raise found
        return found

    def plan(self, image: ImageConfig) -> ImagePlan | None:
        """Return the plan, None when the image has to be resolved first.

        Raises InputError for what is wrong with mapped files, and SourceError as `unresolved`.
        """
        if self.unresolved(image) is not None:
            return None
        content = self.lock.read()
        entry = content.images[self.lock_name(image)]
        pinned = content.agents.get(self.agent_name(image) or "")
        known = self._plans.get(image.name)
        if known is None or known[:2] != (entry, pinned):
            known = self._plans[image.name] = entry, pinned, self._make(image, entry, pinned)
        return known[2]

    def hold(self, image: ImageConfig) -> None:
        """Keep what a build of the image uses or makes from being removed, see `leases`. Raises as `plan`."""
        plan = self.plan(image)
        self.store.hold(plan.keys if plan else [])

    def forget(self, image: ImageConfig) -> None:
        """Look at the image's local source again: it was just resolved."""
        self._identities.pop(self.lock_name(image), None)

    def reread(self, image: ImageConfig) -> None:
        """Look at the image's mapped files and agent again: they were just made."""
        self._plans.pop(image.name, None)
        self._expanded.pop(image.name, None)

    def check(self, images: Iterable[ImageConfig]) -> None:
        """Find what makes a build of these images impossible before anything is started.

        Raises InputError with all mistakes in mappings and local agents, or for SOURCE_DATE_EPOCH,
        LockError for a lock file that cannot be read, or with all entries that `locked` misses,
        FilesystemError for a type that cannot be made here, ToolError for what `[output]` wants.
        """
        source_date_epoch()
        self.lock.read()
        problems: list[FledgeError] = []
        missing: list[str] = []
        with self.digest_of.together():
            for image in images:
                found = list(self._mistakes(image))
                problems += found
                if found:
                    continue
                try:
                    self._check_type(image)
                    if self.locked and (reason := self.unresolved(image)):
                        missing.append(f"{image.name}: {reason}")
                except FledgeError as error:
                    problems.append(error)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            kind = InputError if any(isinstance(error, InputError) for error in problems) else FledgeError
            raise kind("\n".join(str(error) for error in problems))
        if missing:
            raise LockError(
                "\n".join(missing), where=str(self.workspace.lock), hint="run `fledge lock` without --locked"
            )

    def _mistakes(self, image: ImageConfig) -> Iterator[FledgeError]:
        """Yield what is wrong with the files that an image names, and with its output, each by itself."""
        for look in (self._mapped, self._local_agent, self._check_output):
            try:
                look(image)
            except FledgeError as error:
                yield error

    def _check_output(self, image: ImageConfig) -> None:
        """Raise ToolError when what makes the form of the image's files is not here: its version is in their keys."""
        for key, tools in _output_tools(image.output).items():
            for tool in tools:
                try:
                    self._tool(tool)
                except ToolError as error:
                    raise ToolError(error.message, where=f"{image.file}: {key}", hint=error.hint) from None

    def _check_type(self, image: ImageConfig) -> None:
        """Raise FilesystemError when the image's filesystem would have to be made and cannot be made here."""
        filesystem, index = image.filesystem, self.store.index
        asked = filesystem.type, filesystem.is_plain, filesystem.compression
        if asked not in self._obstacles:
            self._obstacles[asked] = possible.obstacle(asked[0], is_plain=asked[1], compression=asked[2], index=index)
        error = self._obstacles[asked]
        if error is not None:
            try:
                plan = self.plan(image)
            except (FilesystemError, ToolError):  # what is not here has no version, so there is no key to look for
                plan = None
            if plan is None or self.store.find(plan.mkfs.key()) is None:
                raise FilesystemError(error.message, where=f"{image.file}: filesystem.type", hint=error.hint)

    def _mapped(self, image: ImageConfig) -> tuple[list[MappedFile], dict[str, Path]]:
        """Return what the mappings bring; once, so that one build sees one state of the files."""
        if image.name not in self._expanded:
            self._refuse_own_folders(image)
            pairs = [(mapping.source, mapping.destination) for mapping in image.mappings]
            with self.digest_of.together():
                self._expanded[image.name] = expand(pairs, image.folder, self.digest_of)
        return self._expanded[image.name]

    def _refuse_own_folders(self, image: ImageConfig) -> None:
        """Raise InputError for a mapped folder that holds what a build writes: it would never be up to date."""
        for mapping in image.mappings:
            source = os.path.realpath(image.folder / mapping.source)
            for own in (self.workspace.build, self.workspace.cache):
                if os.path.commonpath([source, own]) == source:
                    raise InputError(
                        f"maps a folder that holds {own}, which builds write to",
                        where=f"{image.file}: mappings.{mapping.source}",
                        hint="map what is in it one by one, or move the image's files to a folder of their own",
                    )

    def _local_agent(self, image: ImageConfig) -> tuple[Path | None, str | None]:
        """Return path and digest of a local agent, None for any other. Raises InputError."""
        spec = self.agent_spec(image)
        if spec is None or spec.source_strategy != "local":
            return None, None
        try:
            path, digest, _ = agent.local_agent(spec, image.folder, self.digest_of)
        except AgentError as error:
            raise InputError(error.message, where=f"{image.file}: {error.where}", hint=error.hint) from None
        return path, digest

    def _make(self, image: ImageConfig, entry: LockedImage, pinned: LockedAgent | None) -> ImagePlan:
        mapped, sources = self._mapped(image)
        agent_path, agent_digest = self._local_agent(image)
        agent_key: Agent | None = None
        if pinned is not None:
            agent_digest = pinned.digest
            agent_key = Agent(digest=agent_digest)
        layers = tuple(map(Layer.of, entry.image.layers))
        epoch = source_date_epoch()
        customize = Customize(
            config=entry.image.config,
            agent=agent_digest,
            mapped=tuple(mapped),
            epoch=entry.created if epoch is None else epoch,
        )
        content = Content(
            diff_ids=tuple(layer.ref.diff_id for layer in layers),
            customization=customize,
            filesystem=image.filesystem,
        )
        mkfs = Mkfs(
            layers=(*(layer.unpack_key for layer in layers), customize.key()),
            filesystem=image.filesystem,
            epoch=customize.epoch,
            uuid=image.filesystem.uuid or str(uuid.UUID(hex=content.key()[7 : 7 + 32], version=4)),
            tools=(self._maker(image.filesystem.type, image.filesystem.compression),),
        )
        tools = _output_tools(image.output)
        return ImagePlan(
            image=image,
            reference=self.reference(image),
            locked=entry,
            layers=layers,
            config=Config(digest=entry.image.config),
            agent=agent_key,
            agent_path=agent_path,
            sources=sources,
            customize=customize,
            mkfs=mkfs,
            assemble=Assemble(
                filesystem=mkfs.key(),
                preallocate=image.preallocate,
                format=other_format(image),
                compression=image.output.compression,
                tools=tuple(map(self._tool, tools["output.format"])),
            ),
            salt=content.key().removeprefix("sha256:"),
            verity_tools=tuple(map(self._tool, tools["output.verity"])),
            output=self.workspace.output(image),
            tree_output=self.workspace.tree_output(image),
            manifest_output=self.workspace.manifest_output(image),
        )


def _output_tools(wanted: Output) -> dict[str, tuple[Tool, ...]]:
    """Return by key what makes the form of an image's files."""
    return {
        "output.format": (QEMU_IMG,) if wanted.format == "qcow2" else (),
        "output.verity": (VERITYSETUP,) if wanted.verity else (),
    }


def _limits(workspace: Workspace) -> Limits:
    """Return the limits of all layers: for each the most that an image asks for, since images share layers."""
    each = [image.limits for image in workspace.images]
    return Limits(
        tar_bytes=max(limits.layer_mb for limits in each) << 20,
        entries=max(limits.entries for limits in each),
        ratio=max(limits.ratio for limits in each),
    )
