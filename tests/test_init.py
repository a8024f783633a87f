"""`fledge init`: what it writes explains itself and builds as it is, whatever the image says of itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks import config, fsutil, manifest, starter
from fledge_tasks.boot import workload
from fledge_tasks.oci.reference import parse
from tests.layers import Member, folder
from tests.layouts import Layout, Place
from tests.test_daemon import ID, FakeDaemon, fake
from tests.test_manifest import OCI_CONFIGS
from tests.tools import need
from tests.workspaces import Workspace, doit

__all__ = ["fake"]

NGINX = {
    "Entrypoint": ["/docker-entrypoint.sh"],
    "Cmd": ["nginx", "-g", "daemon off;"],
    "ExposedPorts": {"443/tcp": {}, "80/tcp": {}},
    "WorkingDir": "/srv",
    "Env": ["A=b"],
    "Healthcheck": {"Test": ["CMD-SHELL", "curl -f http://localhost:80/healthz || exit 1"], "Timeout": 3_000_000_000},
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty workspace, and beside it the layout `layouts/nginx`."""
    place = Place(tmp_path / "w", tmp_path / "home")
    place.root.mkdir()
    place.home.mkdir()
    place.layout("nginx").write([folder("srv"), Member("srv/page", b"page")], config=NGINX)
    return place


def document(file: Path) -> dict[str, Any]:
    return tomli.loads(file.read_text())


def files(root: Path) -> list[str]:
    """Return the files that are there beside the layouts."""
    found = [path.relative_to(root) for path in root.rglob("*") if not path.is_dir()]
    return sorted(str(path) for path in found if path.parts[0] != "layouts")


def test_what_is_written(place: Place) -> None:
    result = place.fledge("init", "web", "--image", "oci:layouts/nginx")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout == f"wrote {place.root}/web/fledge.toml\nwrote {place.root}/web/dodo.py\n"
    assert files(place.root) == ["web/dodo.py", "web/fledge.toml"]
    assert document(place.root / "web/fledge.toml") == {
        "version": "1",
        "strategy": "oci_rootfs",
        "source": {"image": "oci:../layouts/nginx", "platform": "linux/amd64"},
        "filesystem": {"type": "ext4", "size_buffer_mb": 100, "preallocate": False},
        "manifest": {
            "version": "0.1.0",
            "resources": {"cpu_cores": 1, "memory_mb": 1024},
            "workload": {
                "type": "http",
                "entrypoint": ["/docker-entrypoint.sh", "nginx", "-g", "daemon off;"],
                "base_url": "http://127.0.0.1:80",
                "workdir": "/srv",
            },
            "health_check": {"endpoint": "/healthz", "timeout_ms": 3000},
        },
    }
    assert (place.root / "web/fledge.toml").stat().st_mode & 0o111 == 0


@pytest.mark.parametrize("inspect", [True, False])
def test_it_builds_as_it_is(place: Place, inspect: bool) -> None:
    """In the folder itself and from above, by `fledge` and by `doit`."""
    need("mke2fs")
    more = [] if inspect else ["--no-inspect"]
    assert place.fledge("init", "web", "--image", "oci:layouts/nginx", *more).code == 0
    place.build()
    above = json.loads(place.output("web").with_name("manifest.json").read_bytes())
    assert above["workload"]["entrypoint"] == ["/docker-entrypoint.sh", "nginx", "-g", "daemon off;"]
    assert above["workload"]["env"] == {"A": "b"}
    assert above["workload"]["workdir"] == "/srv"
    assert above["health_check"]["endpoint"] == ("/healthz" if inspect else "/")
    inside = Workspace(place.root / "web", place.home)
    doit(inside)
    assert inside.build().stages("web") == []
    assert inside.output("web").read_bytes() == place.output("web").read_bytes()


@pytest.mark.parametrize(
    "marks",
    [
        ["# [mappings]", '# "app.conf" = "/etc/app.conf"'],
        ["# [agent]", '# source_strategy = "release"', '# version = "latest"'],
        ['# url_prefix = "https://images.example.org"'],
        ['# name = "web"'],
    ],
)
def test_the_examples_in_comments_are_right(place: Place, marks: list[str]) -> None:
    """Without their '# ' they are taken."""
    place.fledge("init", "other", "--image", "oci:layouts/nginx")
    file = place.root / "other/fledge.toml"
    lines = file.read_text().splitlines()
    changed = [line.removeprefix("# ") if line.startswith(tuple(marks)) else line for line in lines]
    assert sum(a != b for a, b in zip(lines, changed, strict=True)) == len(marks)
    file.write_text("\n".join(changed))
    assert config.load(file, "f").source.image == "oci:../layouts/nginx"


def test_guesses_are_said_to_be(place: Place) -> None:
    """An image that says nothing but that it has another protocol's port."""
    place.layout("bare").write([folder("srv")], config={"ExposedPorts": {"53/udp": {}}, "Entrypoint": [""]})
    place.fledge("init", "web", "--image", "oci:layouts/bare")
    text = (place.root / "web/fledge.toml").read_text()
    assert 'entrypoint = ["/bin/sh"]     # a guess: the image names no program\n' in text
    assert 'base_url = "http://127.0.0.1:80"     # a guess: the image exposes no TCP port\n' in text
    place.fledge("init", "nginx", "--image", "oci:layouts/nginx")
    text = (place.root / "nginx/fledge.toml").read_text()
    assert "guess" not in text
    assert 'base_url = "http://127.0.0.1:80"     # the lowest TCP port that the image exposes\n' in text


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (None, ("/", 10000)),
        ({}, ("/", 10000)),
        ({"Test": ["NONE"]}, ("/", 10000)),
        ({"Test": ["CMD", "pg_isready"], "Timeout": 10**9}, ("/", 10000)),
        ({"Test": ["CMD", "curl", "http://localhost"]}, ("/", 10000)),
        ({"Test": ["CMD", "curl", "http://localhost:8080/a/b?x=1"], "Timeout": 5 * 10**8}, ("/a/b", 500)),
        ({"Test": ["CMD-SHELL", "wget -qO- 'https://127.0.0.1/ready' || exit 1"]}, ("/ready", 10000)),
        ({"Test": ["CMD", "curl", "http://h/x"], "Timeout": 10}, ("/x", 10000)),
        ({"Test": ["CMD", "curl", "http://h/x"], "Timeout": 1 << 62}, ("/x", 10000)),
        ({"Test": ["CMD", "curl", "http://h/x"], "Timeout": "3s"}, ("/x", 10000)),
        ({"Test": "curl http://h/x", "Timeout": []}, ("/", 10000)),
        ({"Test": [3, None, {}]}, ("/", 10000)),
        ("curl", ("/", 10000)),
    ],
)
def test_health_checks(check: object, expected: tuple[str, int]) -> None:
    run = {"Healthcheck": check, "ExposedPorts": {"80/tcp": {}}}
    found = tomli.loads(starter.fledge_toml("x", "linux/amd64", None, {"config": run}))
    assert found["manifest"]["health_check"] == dict(zip(("endpoint", "timeout_ms"), expected, strict=True))


@pytest.mark.parametrize(
    ("run", "serves"),
    [
        ({}, False),
        ({"ExposedPorts": {"53/udp": {}}, "Healthcheck": {"Test": ["CMD", "pg_isready"]}}, False),
        ({"ExposedPorts": {"53/tcp": {}}}, True),
        ({"Healthcheck": {"Test": ["CMD", "curl", "http://localhost/ready"]}}, True),
    ],
)
def test_only_what_serves_gets_a_health_check(run: dict[str, Any], serves: bool) -> None:
    """`fledge boot` takes an image for a server when fledge.toml names a port: a guess in it would fail each job."""
    text = starter.fledge_toml("x", "linux/amd64", None, {"config": run})
    asked = tomli.loads(text)["manifest"]
    made = {"name": "x", "workload": {"entrypoint": ["/x"], "base_url": "http://h"}, "resources": asked["resources"]}
    made["health_check"] = {"endpoint": "/", "timeout_ms": 1}
    assert (workload.read(made, asked, {"config": run}).check is not None) == serves
    # Without their marks, the comments say it is a server.
    marked = ("# base_url", "# [manifest.health_check]", "# endpoint", "# timeout_ms")
    lines = [line.removeprefix("# ") if line.startswith(marked) else line for line in text.splitlines()]
    found = tomli.loads("\n".join(lines))
    assert list(config.FLEDGE.findings("", found)) == []
    assert found["manifest"]["workload"]["base_url"].startswith("http://127.0.0.1:")
    assert set(found["manifest"]["health_check"]) == {"endpoint", "timeout_ms"}


# --- where, and under which name ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "image", "written"),
    [
        (".", "oci:layouts/nginx", "oci:layouts/nginx"),
        ("./", "oci:./layouts/../layouts/nginx", "oci:layouts/nginx"),
        ("a/b", "oci:layouts/nginx", "oci:../../layouts/nginx"),
        ("../beside", "oci:layouts/nginx", "oci:../w/layouts/nginx"),
        ("link", "oci:layouts/nginx", "oci:../../w/layouts/nginx"),
    ],
)
def test_paths_start_where_the_command_does(place: Place, target: str, image: str, written: str) -> None:
    (place.root.parent / "far" / "away").mkdir(parents=True)
    (place.root / "link").symlink_to(place.root.parent / "far" / "away")
    result = place.fledge("init", target, "--image", image)
    assert result.code == 0, result.stderr
    file = place.root / target / "fledge.toml"
    assert document(file)["source"]["image"] == written
    loaded = config.load(file, "f")
    assert os.path.samefile(loaded.folder / written.removeprefix("oci:"), place.root / "layouts/nginx")


def test_an_absolute_path_stays_one(place: Place) -> None:
    image = f"oci:{place.root}/layouts/nginx"
    place.fledge("init", "web", "--image", image)
    assert document(place.root / "web/fledge.toml")["source"]["image"] == image


@pytest.mark.parametrize(
    "image", ["nginx", "nginx:1.25", "docker://ghcr.io/a/b@sha256:" + "1" * 64, "docker-daemon:x:1"]
)
def test_other_references_stay_as_they_are_written(place: Place, image: str) -> None:
    assert place.fledge("init", "web", "--image", image, "--no-inspect", "--platform", "linux/arm64").code == 0
    assert document(place.root / "web/fledge.toml")["source"] == {"image": image, "platform": "linux/arm64"}


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("web", "nginx", None),
        ("my web", "nginx", "nginx"),
        ("my web", "docker://ghcr.io/team/shop_front:1", "shop_front"),
        ("ü", "oci:layouts/my image.dir:tag", "my-image.dir"),
        ("ü", "oci:layouts/" + "x" * 200, "x" * 128),
        ("ü", "dir:/ö/", "image"),
        ("ü", "docker-daemon:sha256:" + "1" * 64, "image"),
        ("", "containers-storage:localhost/a:b", "a-b"),
    ],
)
def test_names(name: str, image: str, expected: str | None) -> None:
    assert starter.image_name(name, parse(image)) == expected
    assert expected is None or manifest.NAME.accepts(expected)


def test_a_folder_whose_name_cannot_be_the_images(place: Place) -> None:
    place.fledge("init", "my web", "--image", "oci:layouts/nginx", "--no-dodo")
    assert config.load(place.root / "my web/fledge.toml", "f").name == "nginx"
    assert files(place.root) == ["my web/fledge.toml"]


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["fledge.toml", "dodo.py", "manifest.toml"])
def test_no_file_is_replaced(place: Place, there: str) -> None:
    (place.root / there).write_text("mine")
    result = place.fledge("init", "--image", "oci:layouts/nginx")
    assert result.code == 2
    assert f"error: {place.root}: found {there}, and no file is replaced" in result.stderr
    assert files(place.root) == [there]
    assert (place.root / there).read_text() == "mine"


def test_a_dangling_link_is_a_file_too(place: Place) -> None:
    (place.root / "fledge.toml").symlink_to("nothing")
    assert place.fledge("init", "--image", "oci:layouts/nginx").code == 2
    assert files(place.root) == ["fledge.toml"]


def test_beside_a_dodo_of_ones_own(place: Place) -> None:
    (place.root / "dodo.py").write_text("mine")
    assert "--no-dodo writes fledge.toml alone" in place.fledge("init", "--image", "oci:layouts/nginx").stderr
    assert place.fledge("init", "--image", "oci:layouts/nginx", "--no-dodo").code == 0
    assert files(place.root) == ["dodo.py", "fledge.toml"]
    assert (place.root / "dodo.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--image", "oci:layouts/gone"], 1, "error: oci:../layouts/gone: there is nothing at "),
        (["--image", "a b"], 2, "error: 'a b': 'a b' is not an image name"),
        (["--image", "oci:my layouts/x"], 1, "error: oci:../my layouts/x: there is nothing at "),
        (["--image", "x\n"], 2, "blanks or control characters"),
        (["--image", "x", "--platform", "windows/amd64"], 2, 'error: --platform: found string "windows/amd64"'),
        (["--image", "oci:layouts/nginx", "--platform", "linux/arm64"], 1, "the image is for linux/amd64"),
        ([], 2, "Missing option '--image'"),
    ],
)
def test_mistakes(place: Place, arguments: list[str], code: int, message: str) -> None:
    result = place.fledge("init", "web", *arguments)
    assert result.code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert ("--no-inspect writes the files without looking at the image" in result.stderr) == (code == 1)
    assert files(place.root) == []
    assert not (place.root / "web").exists()


def test_a_file_where_the_folder_should_be(place: Place) -> None:
    (place.root / "web").write_text("")
    result = place.fledge("init", "web", "--image", "oci:layouts/nginx")
    assert result.code == 2
    assert f"error: {place.root}/web: not a folder" in result.stderr


def test_a_malformed_config_is_named(place: Place) -> None:
    place.layout("bad").write([folder("srv")], config={"Entrypoint": "sh"})
    result = place.fledge("init", "web", "--image", "oci:layouts/bad")
    assert result.code == 1
    assert "the OCI config is malformed at config.Entrypoint" in result.stderr
    assert files(place.root) == []


def test_both_files_or_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(target: Path, data: bytes) -> None:
        if target.name == "dodo.py":
            raise OSError(28, "No space left on device")
        write_new(target, data)

    write_new = fsutil.write_new
    monkeypatch.setattr(fsutil, "write_new", failing)
    result = place.fledge("init", "web", "--image", "oci:layouts/nginx")
    assert result.code == 1
    assert f"error: {place.root}/web: no space left on the disk" in result.stderr
    assert files(place.root) == []


def test_a_file_that_comes_into_being_meanwhile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def racing(target: Path, data: bytes) -> None:
        if target.name == "dodo.py":
            target.write_text("mine")
        write_new(target, data)

    write_new = fsutil.write_new
    monkeypatch.setattr(fsutil, "write_new", racing)
    result = place.fledge("init", "web", "--image", "oci:layouts/nginx")
    assert result.code == 2
    assert "found dodo.py, and no file is replaced" in result.stderr
    assert files(place.root) == ["web/dodo.py"]
    assert (place.root / "web/dodo.py").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(target: Path, _: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(fsutil, "write_new", refusing)
    result = place.fledge("init", "web", "--image", "x", "--no-inspect")
    assert result.code == 1
    assert f"error: {place.root}/web/fledge.toml: Permission denied" in result.stderr


# --- the Docker daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["nginx:1", "docker-daemon:nginx:1"])
def test_the_daemon_tells_a_config_without_an_export(place: Place, fake: FakeDaemon, image: str) -> None:
    fake.has("docker.io/library/nginx:1", ID, Config=NGINX)
    result = place.fledge("init", "web", "--image", image)
    assert result.code == 0, result.stderr
    assert document(place.root / "web/fledge.toml")["manifest"]["workload"]["entrypoint"][0] == "/docker-entrypoint.sh"
    assert fake.asked == ["/images/docker.io/library/nginx:1/json"]


def test_the_daemons_image_is_for_another_platform(place: Place, fake: FakeDaemon) -> None:
    fake.has("docker.io/library/nginx:1", ID, Config=NGINX)
    result = place.fledge("init", "web", "--image", "nginx:1", "--platform", "linux/arm64")
    assert result.code == 1
    assert "the image is for linux/amd64" in result.stderr


def test_what_the_daemon_lacks_is_looked_for_in_the_registry(place: Place, fake: FakeDaemon) -> None:
    need("skopeo")
    with_port = "127.0.0.1:1/nginx:1"
    result = place.fledge("init", "web", "--image", with_port)
    assert result.code == 1
    assert "docker://127.0.0.1:1/nginx:1" in result.stderr
    assert f"the Docker daemon was asked first: the Docker daemon has no image {with_port}" in result.stderr
    assert fake.asked == [f"/images/{with_port}/json"]
    assert place.fledge("init", "web", "--image", f"docker-daemon:{with_port}").code == 1


# --- whatever images say -------------------------------------------------------------------------------------

# Not the lone surrogates: JSON is refused that holds one.
TEXTS = st.text(st.characters(codec="utf-8")) | st.sampled_from(
    [
        '"',
        "\\",
        '"""',
        "'''",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "\x7f",
        "\x1b[31m",
        "\u202e",
        "\ufeff",
        "\u2028",
        "😀",
        "\U0010ffff",
        "]\n[x]",
    ]
)


@given(st.lists(TEXTS, max_size=4))
def test_strings_survive_in_toml(words: list[str]) -> None:
    text = starter.toml(words)
    assert text.isprintable(), "nothing that a terminal or an editor would act on"
    assert tomli.loads(f"x = {text}") == {"x": words}
    assert tomli.loads(f"x = {starter.toml(words[0] if words else '')}") == {"x": words[0] if words else ""}


HOSTILE = st.fixed_dictionaries(
    {},
    optional={
        "Entrypoint": st.lists(TEXTS, max_size=3),
        "Cmd": st.lists(TEXTS, max_size=3),
        "WorkingDir": TEXTS,
        "ExposedPorts": st.dictionaries(TEXTS | st.sampled_from(["80/tcp", "70000/tcp"]), st.none(), max_size=3),
        "Healthcheck": st.fixed_dictionaries(
            {"Test": st.lists(TEXTS | TEXTS.map(lambda text: f"http://h/{text}"), max_size=3)},
            optional={"Timeout": st.integers() | TEXTS},
        ),
    },
)


@given(OCI_CONFIGS | HOSTILE)
def test_any_config_gives_a_file_that_is_right(run: dict[str, Any]) -> None:
    text = starter.fledge_toml("nginx:alpine", "linux/amd64", None, {"config": run})
    assert text.replace("\n", "").isprintable()
    found = tomli.loads(text)
    assert list(config.FLEDGE.findings("", found)) == []
    assert set(found) == {"version", "strategy", "source", "filesystem", "manifest"}
    assert set(found["manifest"]) | {"health_check"} == {"version", "resources", "workload", "health_check"}
    serves = "health_check" in found["manifest"]
    assert serves == ("base_url" in found["manifest"]["workload"])
    assert serves or manifest.lowest_tcp_port(run.get("ExposedPorts") or ()) is None
    command = [*run.get("Entrypoint", []), *run.get("Cmd", [])]
    entrypoint = found["manifest"]["workload"]["entrypoint"]
    assert entrypoint == ["/bin/sh"] or entrypoint == command[len(command) - len(entrypoint) :]


def test_a_path_that_is_no_text(place: Place) -> None:
    """It could not be written down in a fledge.toml."""
    odd = place.root / os.fsdecode(b"\xff")
    odd.mkdir()
    Layout(odd / "layout").write([folder("srv")])
    result = place.fledge("init", "web", "--image", f"oci:{os.fsdecode(bytes([255]))}/layout")
    assert result.code == 2
    assert "is not an image reference" in result.stderr
    assert files(place.root / "web") == []
