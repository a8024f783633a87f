"""`fledge build` against the shell recipe, on real images, in one run. See README.md.

Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.real.images import Images, cache_folder
from tests.real.registry import Registry
from tests.tools import PATH
from tests.workspaces import Workspace

Times = dict[str, list[float]]

IMAGES = ("web", "science")
COLD_RATIO, MAPPING_RATIO, NOTHING_SECONDS, PEAK_MIB, MANYFILES_SECONDS = 4.0, 12.0, 0.5, 250.0, 10.0
_SLACK_MIB = 64


class Bench:
    """Runs and times commands in one scratch folder. `peak_kib` is the largest process of our builds."""

    def __init__(self, scratch: Path, registry: Registry) -> None:
        self.scratch = scratch
        self.registry = registry
        self.peak_kib = 0

    def recipe(self, reference: str, times: Times) -> None:
        """Make an image the way a shell script does."""
        folder = self.scratch / "recipe"
        folder.mkdir()
        layout, bundle, image = f"{folder}/layout:image", folder / "bundle", folder / "rootfs.img"
        started = time.monotonic()
        self._step(times, "skopeo copy", "skopeo", "copy", "--quiet", f"docker://{reference}", f"oci:{layout}")
        self._step(times, "umoci unpack", "umoci", "unpack", "--image", layout, str(bundle))
        kib = int(subprocess.check_output(["du", "-sk", bundle / "rootfs"]).split()[0])
        size = f"{kib // 1024 * 11 // 10 + _SLACK_MIB}M"
        self._step(times, "mke2fs -d", "mke2fs", "-q", "-F", "-t", "ext4", "-d", f"{bundle}/rootfs", str(image), size)
        self._step(times, "sha256sum", "sha256sum", str(image))
        times["recipe"].append(time.monotonic() - started)
        shutil.rmtree(folder)

    def _step(self, times: Times, name: str, *command: str) -> None:
        started = time.monotonic()
        env = {"PATH": PATH, "HOME": str(self.registry.home)}
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        times[name].append(time.monotonic() - started)

    def build(self, workspace: Workspace) -> float:
        """Run `fledge build` and return its seconds, Python's start included."""
        started = time.monotonic()
        process = subprocess.Popen(
            workspace.command("build"),
            env=workspace.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)  # the largest of the process and all that it waited for
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"fledge build failed: {workspace.fledge('build').stderr}")
        self.peak_kib = max(self.peak_kib, usage.ru_maxrss)
        return seconds

    def fledge(self, name: str, reference: str, times: Times) -> None:
        """Build an image cold, with one mapping changed, and with nothing changed."""
        workspace = Workspace(self.scratch / "fledge", self.registry.home)
        folder = workspace.add(name, f"docker://{reference}", mappings={"mapped": "/etc/mapped"})
        (folder / "mapped").write_text("first\n")
        times["cold"].append(self.build(workspace))
        (folder / "mapped").write_text("second\n")
        times["mapping changed"].append(self.build(workspace))
        times["nothing changed"] += [self.build(workspace) for _ in range(3)]
        shutil.rmtree(workspace.root)

    def manyfiles(self, reference: str) -> float:
        """Build the image with 120,000 files in one folder from cached layers."""
        workspace = Workspace(self.scratch / "many", self.registry.home)
        workspace.add("many", f"docker://{reference}")
        self.build(workspace)
        workspace.add("many", f"docker://{reference}", buffer_mb=101)
        seconds = self.build(workspace)
        shutil.rmtree(workspace.root)
        return seconds


def main() -> int:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run (default: 3)")
    parser.add_argument("--image", choices=IMAGES, action="append", help="only this one")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=cache_folder()))
    registry = Registry(cache_folder() / "registry", scratch)
    registry.start()
    images = Images(registry, cache_folder())
    try:
        return _run(Bench(scratch, registry), images, arguments.image or IMAGES, arguments.rounds)
    finally:
        registry.stop()
        images.close()
        shutil.rmtree(scratch)


def _run(bench: Bench, images: Images, names: Sequence[str], rounds: int) -> int:
    results: list[tuple[str, str, bool]] = []
    for name in names:
        reference = images.reference(name)
        times: Times = defaultdict(list)
        for number in range(rounds):
            print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            bench.recipe(reference, times)
            bench.fledge(name, reference, times)
        recipe = statistics.median(times["recipe"])
        print(f"\n{name:<18}{'median':>10}{'min':>10}{'max':>10}{'recipe is … times as slow':>28}")
        for what, seconds in times.items():
            median = statistics.median(seconds)
            ratio = f"{recipe / median:>28.1f}" if what in {"cold", "mapping changed", "nothing changed"} else ""
            print(f"  {what:<16}{median:>8.2f} s{min(seconds):>8.2f} s{max(seconds):>8.2f} s{ratio}")
        nothing = statistics.median(times["nothing changed"])
        results.append(
            (f"{name}, nothing changed: {nothing:.2f} s", f"< {NOTHING_SECONDS} s", nothing < NOTHING_SECONDS)
        )
        if name == "science":
            cold = recipe / statistics.median(times["cold"])
            mapping = recipe / statistics.median(times["mapping changed"])
            results.append((f"{name}, cold: {cold:.1f} times", f">= {COLD_RATIO}", cold >= COLD_RATIO))
            results.append((f"{name}, mapping: {mapping:.1f} times", f">= {MAPPING_RATIO}", mapping >= MAPPING_RATIO))
    print("manyfiles", file=sys.stderr, flush=True)
    many = bench.manyfiles(images.reference("manyfiles"))
    results.append((f"120,000 files in one folder: {many:.2f} s", f"< {MANYFILES_SECONDS} s", many < MANYFILES_SECONDS))
    peak = bench.peak_kib / 1024
    results.append((f"largest process: {peak:.0f} MiB", f"< {PEAK_MIB} MiB", peak < PEAK_MIB))
    print()
    for found, target, is_met in results:
        print(f"{'PASS' if is_met else 'FAIL'}  {found:<44} target {target}")
    return 0 if all(is_met for _, _, is_met in results) else 1


if __name__ == "__main__":
    sys.exit(main())
