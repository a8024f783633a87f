"""Filesystem images without their file data, made from a merged tree."""
