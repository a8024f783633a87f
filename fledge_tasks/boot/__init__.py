"""Booting an image in QEMU, to see that it does what its manifest says. Nothing here changes an image."""
