"""The one error tree. Errors are raised low with all facts, and printed once, by the command line.

`exit_code` is what `fledge` exits with: 2 when the user's input is wrong, 1 when a build failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

NOT_DECODED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what they should be: some texts it decodes late, and it recurses."""

_LINE_CHARACTERS = 4000


def printable(text: str) -> str:
    """Return a text for a terminal: what others wrote may hold control characters, and be of any length."""
    if not text.replace("\n", "").replace("\t", "").isprintable():
        keep = {"\n", "\t"}
        text = "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)
    if len(text) > _LINE_CHARACTERS:
        text = "\n".join(map(_shortened, text.split("\n")))
    return text


def _shortened(line: str) -> str:
    """Return a line without its middle, if it is too long: what was expected stands at its end."""
    half = _LINE_CHARACTERS // 2
    return line if len(line) <= _LINE_CHARACTERS else f"{line[:half]}...{line[-half:]}"


def _hint(hint: str | None) -> str:
    return "\n  hint: " + hint.replace("\n", "\n  ") if hint else ""


class FledgeError(Exception):
    """Base of every error that this package raises on purpose.

    `message` says what was found and what was expected, `where` the file, key or image it is
    about, `hint` what to do next. All three are plain text of one or a few lines.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return printable(text + _hint(self.hint))


class InputError(FledgeError):
    """What the user wrote or asked for is wrong; nothing was started."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in one file: `key` is the dotted key path, '' for the file as a whole."""

    file: str
    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else self.file
        text = f"{place}: {self.message}"
        return text + _hint(self.hint)


class ConfigError(InputError):
    """Every mistake in every configuration file of a workspace, in one error."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class LockError(InputError):
    """fledge.lock is missing an entry, is stale, or cannot be read."""


class ToolError(FledgeError):
    """A program or library that is needed is missing or too old."""


class CommandError(FledgeError):
    """A program that we started failed. `stderr` holds the tail of what it complained, `output` its stdout."""

    def __init__(
        self, message: str, *, returncode: int, stderr: str, output: bytes = b"", hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.returncode = returncode
        self.stderr = stderr
        self.output = output

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_command_error, (self.message, self.returncode, self.stderr, self.output, self.hint)


def _rebuild_command_error(message: str, returncode: int, stderr: str, output: bytes, hint: str | None) -> CommandError:
    return CommandError(message, returncode=returncode, stderr=stderr, output=output, hint=hint)


class SourceError(FledgeError):
    """An image cannot be had from where it was asked for."""


class ImageNotFoundError(SourceError):
    """The source answered that it has no such image: the daemon-first rule falls back on this."""


class NoDaemonError(SourceError):
    """There is no Docker daemon to ask: the daemon-first rule falls back on this."""


class OfflineError(SourceError):
    """The network would be needed and `--offline` forbids it."""


class BlobError(SourceError):
    """A blob does not have the digest or size that its manifest promises."""


class LayerError(FledgeError):
    """A layer is not a well-formed archive, or not the one its diff ID names."""


class LimitError(LayerError):
    """A layer comes to more than `[limits]` lets it."""


class TreeError(FledgeError):
    """Layers, mappings or agent cannot be merged into one file tree."""


class MappingError(InputError):
    """A mapped file or folder cannot be used."""


class AgentError(FledgeError):
    """The agent binary cannot be had, or is not the one its checksum names."""


class FilesystemError(FledgeError):
    """The filesystem cannot hold the tree, or cannot be made here."""


class MountError(FilesystemError):
    """This process may not mount, or has no loop device. Says nothing about the image."""


class ManifestError(FledgeError):
    """What the user wants in the manifest is not true of the image that was built."""


class BootError(FledgeError):
    """An image cannot be booted here, or its guest came to nothing."""


class ExportError(InputError):
    """A virtual machine monitor cannot be given what was asked for."""


class ArchiveError(FledgeError):
    """A file is not an archive of cache entries, or a damaged one."""


class StoreError(FledgeError):
    """The content store or the build folder cannot be used: no space, no permission."""
