"""The command line, as a program: exit codes, messages, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fledge_tasks.digest import is_digest, sha256_bytes, short
from tests.layers import Member, archive, compress, folder
from tests.layouts import Layout, Place
from tests.tools import PATH, need, take_rights, wait_for
from tests.workspaces import REPOSITORY, Result, Workspace, processes_about, sha256_of

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" + bytes(20_000), mode=0o755)]
MORE = [folder("etc"), Member("etc/motd", b"hello\n" * 500)]
GOOD = 'version = "1"\nstrategy = "oci_rootfs"\n[source]\nimage = "oci:../layouts/web"\n[filesystem]\ntype = "ext4"\n'


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A workspace with one image `web` of two layers and one mapping, not built yet."""
    need("mke2fs")
    place = Place(tmp_path / "w", tmp_path / "home")
    (place.add("web", "oci:../layouts/web", buffer_mb=1, mappings={"conf": "/srv/conf"}) / "conf").write_text("one\n")
    place.layout("web").write(BASE, MORE)
    return place


@pytest.fixture
def program(place: Place) -> Workspace:
    """The same, with commands that run as programs of their own."""
    return Workspace(place.root, place.home)


def layout(workspace: Workspace) -> Layout:
    return Layout(workspace.root / "layouts" / "web").write(BASE, MORE)


def toml(workspace: Workspace) -> Path:
    return workspace.root / "web" / "fledge.toml"


def edit(workspace: Workspace, old: str, new: str) -> None:
    text = toml(workspace).read_text()
    assert old in text
    toml(workspace).write_text(text.replace(old, new))


def refused(workspace: Workspace, code: int, *messages: str, command: Sequence[str] = ("build",)) -> Result:
    """Run a command that must fail like this, print nothing of Python, and leave nothing behind."""
    result = workspace.fledge(*command)
    assert result.code == code, result
    assert "Traceback" not in result.stderr
    for message in messages:
        assert message in result.stderr
    assert workspace.leftovers() == []
    return result


# --- what is printed when all is well ---------------------------------------------------------------


def test_json(program: Workspace) -> None:
    result = program.fledge("build", "--json")
    assert (result.code, result.stderr) == (0, "")
    summary = json.loads(result.stdout)
    assert list(summary) == ["images", "seconds"]
    assert summary["seconds"] > 0
    [image] = summary["images"]
    assert list(image) == ["name", "image", "manifest", "sha256", "bytes", "stages"]
    assert image["name"] == "web"
    assert image["image"] == str(program.output("web"))
    assert image["manifest"] == str(program.output("web").with_name("manifest.json"))
    assert image["sha256"] == sha256_of(program.output("web"))
    assert image["bytes"] == program.output("web").stat().st_size
    names = [short(diff_id) for diff_id in layout(program).diff_ids]
    assert [(stage["stage"], stage["task"]) for stage in image["stages"]] == [
        ("resolve", "resolve:web"),
        ("fetch", f"fetch:{names[0]}"),
        ("fetch", f"fetch:{names[1]}"),
        ("unpack", f"unpack:{names[0]}"),
        ("unpack", f"unpack:{names[1]}"),
        ("mkfs", "mkfs:web"),
        ("assemble", "assemble:web"),
        ("manifest", "manifest:web"),
    ]
    for stage in image["stages"]:
        assert list(stage) == ["stage", "task", "key", "status", "seconds", "bytes"]
        assert is_digest(stage["key"])
        assert stage["status"] == "built"
        assert stage["seconds"] >= 0
        assert stage["bytes"] > 0
    assert image["stages"][6]["bytes"] == image["bytes"]


def test_json_of_a_failure(place: Place) -> None:
    layout(place).write(BASE, MORE, diff_ids=["sha256:" + "1" * 64, "sha256:" + "2" * 64])
    result = place.fledge("build", "--json")
    assert result.code == 1
    assert "error: unpack:111111111111: " in result.stderr
    image = result.image("web")
    assert (image["sha256"], image["bytes"]) == (None, 0)
    statuses = {stage["task"]: stage["status"] for stage in image["stages"]}
    assert statuses["resolve:web"] == statuses["fetch:111111111111"] == "built"
    assert statuses["unpack:111111111111"] == statuses["unpack:222222222222"] == "failed"
    assert statuses["mkfs:web"] == statuses["assemble:web"] == "not-needed"
    assert [stage["key"] for stage in image["stages"]][-1] is None
    [failed, _] = [stage for stage in image["stages"] if stage["status"] == "failed"]
    assert "sha256:1111" in failed["error"]


def test_a_failed_image_has_reused_nothing(place: Place) -> None:
    """Stages that never had their turn are no stages that were spared."""
    layout(place).write(BASE, MORE, diff_ids=["sha256:" + "1" * 64, "sha256:" + "2" * 64])
    first, _ = place.fledge("build").stdout.splitlines()
    assert re.fullmatch(r"web: failed, [23] stages built, \d+\.\d\d s", first)


def test_plain_output(place: Place) -> None:
    result = place.fledge("build", "-j", "1")
    assert result.code == 0
    why, *lines = result.stderr.splitlines()
    assert why == "web: oci:layouts/web linux/amd64 is not in fledge.lock"
    assert [line.split(":")[0] for line in lines] == [
        "resolve", "fetch", "unpack", "fetch", "unpack", "mkfs", "assemble", "manifest",
    ] or len(lines) == 7  # one connection fetches both  # fmt: skip
    assert all(re.fullmatch(r"\w+:\w+ built in \d+\.\d\d s(, .+)?", line) for line in lines)
    first, last = result.stdout.splitlines()
    size = f"{place.output('web').stat().st_size / 1e6:.1f} MB"
    checksum = sha256_of(place.output("web"))
    assert first.startswith(f"web: {place.output('web')}, {size}, {checksum}, 8 stages built, 0 reused")
    assert re.fullmatch(r"1 image in \d+\.\d\d s", last)
    again = place.fledge("build")
    assert again.stderr == ""
    assert "0 stages built, 8 reused" in again.stdout
    (place.root / "web" / "conf").write_text("two\n")
    assert place.fledge("build").stderr.splitlines()[0].startswith("web: /srv/conf digest: sha256:")
    place.output("web").with_name("manifest.json").unlink()
    assert ", 1 stage built, 7 reused, " in place.fledge("build").stdout


def test_a_terminal_gets_a_table(program: Workspace) -> None:
    need("script")
    command = " ".join(program.command("build"))
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env={**program.environment(), "TERM": "xterm", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    assert "mkfs:web built in" in text
    assert re.search(r"image\s+built\s+reused\s+size\s+time\s+file", text)
    assert re.search(r"web\s+8\s+0\s", text)


# --- the user's input is wrong: exit code 2 ------------------------------------------------------------


def test_no_fledge_toml(tmp_path: Path) -> None:
    refused(
        Workspace(tmp_path, tmp_path),
        2,
        f"error: {tmp_path}: found no fledge.toml",
        "hint: `fledge init --image nginx:alpine` writes one; by hand",
    )


def test_no_such_folder(tmp_path: Path) -> None:
    refused(Workspace(tmp_path / "no", tmp_path), 2, f"error: {tmp_path}/no: no such folder")


def test_broken_toml(place: Place) -> None:
    toml(place).write_text('version = "1\n')
    refused(place, 2, "error: web/fledge.toml: not valid TOML", "at line 1")


def test_every_problem_of_every_file_at_once(place: Place) -> None:
    edit(place, 'type = "ext4"', 'type = "ext5"\npreallocated = true')
    (place.root / "api").mkdir()
    (place.root / "api" / "fledge.toml").write_text(GOOD.replace('"1"', "1") + "size_buffer_mb = -1\n")
    result = refused(
        place,
        2,
        'web/fledge.toml: filesystem.type: found string "ext5", expected',
        "web/fledge.toml: filesystem.preallocated: unknown key",
        'did you mean "preallocate"?',
        "api/fledge.toml: version: ",
        "api/fledge.toml: filesystem.size_buffer_mb: found integer -1",
    )
    assert result.stdout == ""


def test_an_unknown_image(place: Place) -> None:
    for command in ("build", "plan", "lock", "clean"):
        refused(place, 2, 'no image is named "wbe"', 'did you mean "web"?', command=(command, "wbe"))


def test_an_unknown_option_and_command(program: Workspace) -> None:
    refused(program, 2, "No such option", command=("build", "--fast"))
    refused(program, 2, "No such command", command=("biuld",))
    refused(program, 2, "0 is not in the range", command=("build", "-j", "0"))


def test_missing_mapping_sources_of_two_images(place: Place) -> None:
    (place.root / "web" / "conf").unlink()
    place.add("api", "oci:../layouts/web", mappings={"gone": "/srv/gone"})
    root = place.root
    for command in ("build", "plan", "lock"):
        refused(
            place,
            2,
            f'{root}/web/fledge.toml: mappings."conf": {root}/web/conf does not exist',
            f'{root}/api/fledge.toml: mappings."gone": {root}/api/gone does not exist',
            command=(command,),
        )
    assert not (root / "fledge.lock").exists()


def test_a_bad_reference_and_another_mistake(place: Place) -> None:
    edit(place, "oci:../layouts/web", "Nginx:alpine")
    edit(place, "size_buffer_mb", "size_bufer_mb")
    bad = "web/fledge.toml: source.image: 'Nginx:alpine'"
    refused(place, 2, bad, "hint: write [registry/]name[:tag]", "web/fledge.toml: filesystem.size_bufer_mb")


def test_a_broken_lock_file(place: Place) -> None:
    place.add_layout("api", BASE)
    (place.root / "fledge.lock").write_text("<<<<<<< ours\n")
    for command in ("build", "build --locked", "plan", "lock"):
        refused(place, 2, f"{place.root}/fledge.lock: cannot be read", "delete it and run", command=command.split())
        assert place.fledge(*command.split()).stderr.count("cannot be read") == 1, "once, however many images there are"
    assert (place.root / "fledge.lock").read_text() == "<<<<<<< ours\n"


def test_locked_without_a_lock_file(place: Place) -> None:
    refused(place, 2, "web: oci:layouts/web linux/amd64 is not in fledge.lock", command=("build", "--locked"))


def test_a_bad_epoch(place: Place) -> None:
    late = Workspace(place.root, place.home, env={"SOURCE_DATE_EPOCH": "4294967296"})
    refused(late, 2, "variable SOURCE_DATE_EPOCH: found '4294967296', expected seconds since 1970 below 4294967296")


# --- a build fails: exit code 1 --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_filesystems_that_cannot_be_made(place: Place, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    need(f"mkfs.{kind}")
    edit(place, 'type = "ext4"', f'type = "{kind}"')
    take_rights(monkeypatch)
    refused(place, 1, f"{toml(place)}: filesystem.type: {kind} images can only be made by root", "choose ext4")


def test_a_missing_layout(place: Place) -> None:
    shutil.rmtree(place.root / "layouts")
    root = place.root
    refused(
        place,
        1,
        f"error: resolve:web: oci:../layouts/web: there is nothing at {root}/layouts/web",
        f"hint: relative paths start at {root}/web",
    )


def test_a_missing_tag(place: Place) -> None:
    edit(place, "layouts/web", "layouts/web:v2")
    refused(place, 1, "there is no image named 'v2'; there are: (unnamed)")


def damage_config(found: Layout) -> None:
    [config] = [path for path in found.blob(0).parent.iterdir() if b'"rootfs"' in path.read_bytes()]
    config.write_bytes(config.read_bytes().replace(b"linux", b"LINUX"))


DAMAGES: dict[str, tuple[Callable[[Layout], object], str]] = {
    "a byte of a blob": (lambda found: flip(found.blob(1)), "blob sha256:"),
    "a blob is cut off": (lambda found: os.truncate(found.blob(1), 20), "found 20 bytes, expected"),
    "a blob is missing": (lambda found: found.blob(1).unlink(), "found no such file"),
    "the config": (damage_config, "blob sha256:"),
    "the index": (lambda found: (found.path / "index.json").write_text("{"), "is not well-formed"),
    "a wrong diff ID": (
        lambda found: found.write(BASE, MORE, diff_ids=[found.diff_ids[0], "sha256:" + "2" * 64]),
        "sha256:" + "2" * 64,
    ),
    "truncated gzip": (lambda found: with_blob(found, compress(archive(MORE))[:-30]), "truncated gzip stream"),
    "no archive": (lambda found: with_blob(found, compress(b"no tar at all" * 100)), "layer"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def with_blob(found: Layout, blob: bytes) -> None:
    """Make the second layer of the image a blob of this content, whatever its diff ID says."""
    found.write_tars([archive(BASE), archive(MORE)], blobs={1: blob})


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_source(place: Place, damage: Callable[[Layout], object], message: str) -> None:
    damage(layout(place))
    result = refused(place, 1, message)
    assert "error: " in result.stderr
    layout(place)  # repaired
    place.build()


def test_no_skopeo(place: Place, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    poor = Workspace(place.root, place.home, env={"PATH": str(tmp_path / "bin")})
    assert poor.fledge("build").code == 0  # a layout needs none
    edit(place, "oci:../layouts/web", "docker://localhost:1/web")
    shutil.rmtree(place.root / "build")
    refused(
        poor,
        1,
        "error: resolve:web: skopeo is not installed (not found on PATH)",
        "hint: install it, for example: sudo apt-get install skopeo",
    )


def test_no_registry(place: Place) -> None:
    need("skopeo")
    edit(place, "oci:../layouts/web", "docker://127.0.0.1:1/web")
    refused(place, 1, "error: resolve:web: docker://127.0.0.1:1/web:latest: ", "connection refused")


def test_offline_with_a_registry(place: Place) -> None:
    edit(place, "oci:../layouts/web", "docker://127.0.0.1:1/web")
    refused(place, 1, "the registry would have to be asked", command=("build", "--offline"))


def test_what_does_not_fail_is_built(place: Place) -> None:
    place.add("api", "oci:../layouts/gone", buffer_mb=1)
    for jobs in ("1", "2"):
        result = place.fledge("build", "--json", "-j", jobs)
        assert result.code == 1
        assert result.image("api")["sha256"] is None
        assert result.image("web")["sha256"] == sha256_of(place.output("web"))
        shutil.rmtree(place.root / "build")


def test_a_failed_build_leaves_what_was_there(place: Place) -> None:
    place.build()
    before = sha256_of(place.output("web")), place.output("web").with_name("manifest.json").read_bytes()
    found = layout(place).write(BASE, MORE, [Member("third", b"3")])
    flip(found.blob(2))
    assert place.fledge("build").code == 1
    assert (
        sha256_of(place.output("web")),
        place.output("web").with_name("manifest.json").read_bytes(),
    ) == before


def test_a_cache_that_cannot_be_made(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    poor = Workspace(place.root, place.home, tmp_path / "file" / "cache")
    refused(
        poor, 1, f"{tmp_path}/file", "Not a directory", "hint: set FLEDGE_CACHE_DIR to a folder that can be written to"
    )


# --- signals -------------------------------------------------------------------------------------------------


def slow(program: Workspace, tmp_path: Path) -> tuple[Workspace, Path]:
    """Return a program in which mke2fs never ends, and the file that is there once it was started."""
    (tmp_path / "bin").mkdir()
    started = tmp_path / "started"
    fake = tmp_path / "bin" / "mke2fs"
    fake.write_text(
        f'#!/bin/sh\ncase "$1" in -V) echo "mke2fs 1.47.0 (5-Feb-2023)" >&2 ;; '
        f"*) for image; do :; done; touch {started}; exec sleep 60 ;; esac\n"
    )
    fake.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{program.environment()['PATH']}"
    return Workspace(program.root, program.home, env={"PATH": path}), started


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_the_middle_of_a_build(
    program: Workspace, tmp_path: Path, signum: signal.Signals, code: int, jobs: str
) -> None:
    busy, started = slow(program, tmp_path)
    process = subprocess.Popen(
        busy.command("build", "-j", jobs),
        env=busy.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(started.exists)
    assert busy.leftovers() != []
    begun = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
    assert time.monotonic() - begun < 5
    assert program.leftovers() == []
    assert not program.output("web").exists()
    wait_for(lambda: processes_about(program.root) == [])
    assert set(program.build().stages("web")) == {"mkfs", "assemble", "manifest"}


STOPPED_WHILE_IT_IMPORTS = """
import signal, sys

class Finder:
    def find_spec(name, path, target=None):
        if name == "fledge_tasks.planner":
            signal.raise_signal({signum})

sys.meta_path.insert(0, Finder)
from fledge_tasks.cli import main
main()
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_it_imports_what_it_needs(program: Workspace, signum: signal.Signals, code: int) -> None:
    script = STOPPED_WHILE_IT_IMPORTS.format(signum=int(signum))
    result = program.run([sys.executable, "-c", script, "-C", str(program.root), "build"], REPOSITORY, 20)
    assert (result.code, result.stdout, result.stderr) == (code, "", "interrupted\n")


def test_an_end_of_input_that_nobody_expects_is_no_traceback(program: Workspace) -> None:
    """click makes the same of it as of Ctrl-C."""
    script = """
        from fledge_tasks.cli import context, main

        def ended(self):
            raise EOFError

        context.Context.load = ended
        main()
        """
    command = [sys.executable, "-c", textwrap.dedent(script), "build"]
    result = program.run(command, REPOSITORY, 20)
    assert (result.code, result.stdout, result.stderr.strip()) == (130, "", "interrupted")


def test_a_reader_that_has_seen_enough(program: Workspace) -> None:
    program.build()
    command = " ".join(program.command("build", "--json"))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"],
        env=program.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(program: Workspace, closed: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *program.command("build")]
    result = program.run(command, program.root, 60)
    assert (result.code, "Traceback" in result.stderr) == (0, False)
    assert (result.stdout == "") == (" >&-" in f" {closed}")
    assert (result.stderr == "") == ("2>&-" in closed)
    assert program.fledge("verify").code == 0


# --- several at once ---------------------------------------------------------------------------------------------


def test_builds_at_once_share_their_work(program: Workspace, tmp_path: Path) -> None:
    """One program, and another one with the same cache: nothing clashes, nothing is built twice."""
    other = Workspace(tmp_path / "other", program.home, program.root / "cache")
    shutil.copytree(program.root, other.root)
    running = [
        subprocess.Popen(
            each.command("build", "--json"),
            env=each.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in (program, program, other, other)
    ]
    results = []
    for process in running:
        output, errors = process.communicate(timeout=60)
        results.append(Result(process.returncode, output, errors))
    assert [(result.code, result.stderr) for result in results] == [(0, "")] * 4
    sums = {sha256_of(program.output("web")), sha256_of(other.output("web"))}
    assert sums == {result.image("web")["sha256"] for result in results}
    assert len(sums) == 1
    built = sorted(task for result in results for task in result.tasks("web") if task.startswith(("unpack", "mkfs")))
    assert len(built) == 3
    assert len(set(built)) == 3
    assert list((program.root / "cache").joinpath("aside").rglob("*")) == []
    assert {path.name for path in program.leftovers()} == {"rootfs.img", "manifest.json", ".fledge.json"}


# --- plan, lock, clean, doctor ---------------------------------------------------------------------------------


def test_plan(place: Place) -> None:
    def plan(*arguments: str) -> list[str]:
        result = place.fledge("plan", *arguments)
        assert (result.code, result.stderr) == (0, "")
        return [" ".join(line.split()) for line in result.stdout.splitlines()]

    first = plan()
    assert first[:2] == ["web:", "resolve:web oci:layouts/web linux/amd64 is not in fledge.lock"]
    assert not (place.root / "fledge.lock").exists()
    assert not (place.root / "cache" / "objects").exists()
    assert not (place.root / "build").exists()
    place.fledge("lock")
    found = layout(place)
    names = [short(diff_id) for diff_id in found.diff_ids]
    sizes = [found.blob(number).stat().st_size for number in range(2)]
    assert plan() == [
        "web:",
        f"fetch:{names[0]} the layer is not in the cache ({sizes[0]} bytes to move)",
        f"unpack:{names[0]} the layer is not in the cache",
        f"fetch:{names[1]} the layer is not in the cache ({sizes[1]} bytes to move)",
        f"unpack:{names[1]} the layer is not in the cache",
        "mkfs:web no such filesystem in the cache, and no earlier build is known",
        "assemble:web rootfs.img is not there",
        "manifest:web the image file is made anew",
    ]
    place.build()
    assert plan() == plan("web") == ["web: up to date"]
    old, new = (sha256_bytes(text)[:19] for text in (b"one\n", b"two\n"))
    (place.root / "web" / "conf").write_text("two\n")
    assert plan() == [
        "web:",
        f"mkfs:web /srv/conf digest: {old}... -> {new}... ({place.root}/web/conf)",
        "assemble:web what goes in has changed",
        "manifest:web the image file is made anew",
    ]
    (place.root / "web" / "conf").write_text("one\n")
    place.output("web").touch()
    assert plan() == ["web:", "assemble:web rootfs.img was changed since it was written"]
    assert place.build().stages("web") == ["assemble"], "it is the image that the manifest describes already"
    place.output("web").with_name("manifest.json").unlink()
    assert plan() == ["web:", "manifest:web manifest.json is not there"]
    layout(place).write(BASE)
    assert plan()[1] == "resolve:web oci:../layouts/web is another image than fledge.lock says"
    assert place.fledge("plan", "--locked").code == 2
    assert not place.output("web").with_name("manifest.json").exists()


def test_what_is_planned_is_what_is_built(place: Place) -> None:
    place.fledge("lock")
    planned = place.fledge("plan").stdout.split()
    built = place.build().tasks("web")
    assert built == sorted((word for word in planned if word in built), key=built.index)


def test_lock(place: Place) -> None:
    result = place.fledge("lock")
    content = json.loads((place.root / "fledge.lock").read_bytes())
    manifest = content["images"]["oci:layouts/web linux/amd64"]["image"]["manifest"]
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout == f"oci:layouts/web linux/amd64: {short(manifest)}\n"
    assert not (place.root / "build").exists()
    assert place.fledge("lock").stdout == ""
    layout(place).write(BASE)
    result = place.fledge("lock", "--update", "web")
    assert re.fullmatch(rf"oci:layouts/web linux/amd64: \w{{12}} \(was {short(manifest)}\)\n", result.stdout)
    place.add("api", "oci:../layouts/web")
    (place.root / "layouts" / "web").rename(place.root / "layouts" / "new")
    edit(place, "layouts/web", "layouts/new")
    shutil.rmtree(place.root / "api")
    assert "oci:layouts/web linux/amd64: dropped" in place.fledge("lock").stdout.splitlines()
    assert list(json.loads((place.root / "fledge.lock").read_bytes())["images"]) == ["oci:layouts/new linux/amd64"]


def test_lock_that_fails(place: Place) -> None:
    place.add("api", "oci:../layouts/gone")
    result = place.fledge("lock")
    assert result.code == 1
    assert "error: resolve:api: " in result.stderr
    assert "oci:layouts/web linux/amd64: " in result.stdout
    assert list(json.loads((place.root / "fledge.lock").read_bytes())["images"]) == ["oci:layouts/web linux/amd64"]


def test_clean(place: Place) -> None:
    (place.root / "cache").mkdir()
    (place.root / "cache" / "README.md").write_text("mine")
    place.add("api", "oci:../layouts/web", buffer_mb=1)
    place.build()
    result = place.fledge("clean", "api")
    assert result.stdout.splitlines() == [
        f"removed {place.output('api')}",
        f"removed {place.output('api').with_name('manifest.json')}",
    ]
    assert not place.output("api").parent.exists()
    assert place.output("web").exists()
    assert place.fledge("clean").code == 0
    assert place.fledge("clean").stdout == ""
    assert list((place.root / "build").rglob("*")) == []
    assert place.build().stages("web") == ["assemble", "manifest"]
    assert place.fledge("clean", "--cache", "web").code == 2
    assert place.fledge("clean", "--cache").code == 0
    assert [path.name for path in (place.root / "cache").iterdir()] == ["README.md"]
    assert (place.root / "fledge.lock").exists()
    assert "unpack" in place.build().stages("web")


def test_doctor(place: Place, tmp_path: Path) -> None:
    need("skopeo")
    result = place.fledge("doctor")
    assert result.code == 0
    lines = {line[9:24].split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    types = {f"{kind} {way}" for kind in ("xfs", "btrfs") for way in ("as root", "rootless")}
    types |= {"squashfs", "erofs", "erofs lz4"}
    tools = {"skopeo", "mke2fs", "libext2fs", "e2fsck", "qemu", "kernel", "qemu-img", "veritysetup", "docker daemon"}
    assert {*tools, "cache", "reflinks", *types} == set(lines)
    assert re.match(r"ok\s+mke2fs\s+1\.\d+\.\d+: ext4", lines["mke2fs"])
    assert lines["cache"].endswith(str(place.root / "cache"))
    assert not (place.root / "cache").exists()
    (tmp_path / "bin").mkdir()
    poor = Workspace(place.root, place.home, env={"PATH": str(tmp_path / "bin")}).fledge("doctor")
    assert poor.code == 1
    assert re.search(r"MISSING\s+skopeo\s+skopeo is not installed .*apt-get install skopeo", poor.stdout)


def test_doctor_knows_what_types_want(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("mkfs.xfs", "6.1.0"), ("mkfs.btrfs", "v6.11"), ("xfs_db", ""), ("xfs_repair", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} version {version}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "btrfs").symlink_to("mkfs.btrfs")
    monkeypatch.setenv("PATH", f"{tmp_path}:{PATH}")
    take_rights(monkeypatch)
    text = place.fledge("doctor").stdout
    assert re.search(r"^no +xfs as root +can only be made by root: run as root$", text, re.MULTILINE)
    assert re.search(r"^no +xfs rootless +mkfs.xfs 6.1.0 .*: install xfsprogs 7.2 or later$", text, re.MULTILINE)
    assert re.search(r"^no +btrfs rootless +mkfs.btrfs 6.11 .*: install btrfs-progs 6.12 or later$", text, re.MULTILINE)
    (tmp_path / "mkfs.btrfs").write_text("#!/bin/sh\necho mkfs.btrfs v7.3\n")
    text = place.fledge("doctor").stdout
    assert re.search(
        r"^no +btrfs rootless +/nothing/subuid grants no subordinate ids to \w+: as root: usermod", text, re.M
    )


def test_version_and_help(program: Workspace) -> None:
    assert re.fullmatch(r"fledge, version \d+\.\d+\.\d+\n", program.fledge("--version").stdout)
    for command in ((), ("init",), ("build",), ("plan",), ("lock",), ("boot",), ("schema",), ("clean",), ("doctor",)):
        result = program.fledge(*command, "--help")
        assert result.code == 0
        assert "Usage: fledge" in result.stdout
