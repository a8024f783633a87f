"""The one action that tasks have, and the value by which its errors reach doit whole."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from doit.exceptions import TaskFailed

from fledge_tasks.errors import FledgeError

_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # the machine's fault, no bug of ours


class StageFailed(TaskFailed):  # type: ignore[misc]  # doit has no types
    """A FledgeError as the value by which doit knows a failed task.

    Unlike an exception that doit catches, it keeps the error whole on its way out of a worker
    process, and doit's own reports print its text without a traceback.
    """

    def __init__(self, error: FledgeError) -> None:
        super().__init__(f"error: {error}")
        self.error = error

    def get_name(self) -> str:
        """Return the name under which doit's reports show it."""
        return "TaskFailed"


class StageAction:
    """The action of a task: calls `function(*args)`, which returns a small JSON dictionary or None.

    `{"status": "hit"}` says that there was nothing to do after all. A FledgeError fails the task and
    comes out of any worker whole; so does a full or broken disk, as a FledgeError. Anything else that
    is raised is a bug, and doit reports it with its traceback.
    """

    def __init__(self, function: Callable[..., Mapping[str, Any] | None], args: Sequence[object] = ()) -> None:
        self.function = function
        self.args = tuple(args)

    def __call__(self) -> dict[str, Any] | StageFailed:
        try:
            return dict(self.function(*self.args) or {})
        except FledgeError as error:
            return StageFailed(error)
        except OSError as error:
            if error.errno not in _ENVIRONMENT:
                raise
            return StageFailed(FledgeError(str(error)))

    def __repr__(self) -> str:
        return f"{self.function.__name__}{self.args}"
