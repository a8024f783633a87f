"""Fuzz targets for what reads bytes that strangers wrote. How to run them: README.md."""
