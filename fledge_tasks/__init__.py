"""fledge-tasks: an incremental build from OCI images to microVM root filesystems."""

__version__ = "0.1.0"
