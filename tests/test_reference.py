from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks.errors import InputError
from fledge_tasks.oci.reference import Reference, lock_name, parse

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("image", "canonical"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("nginx:alpine", "docker.io/library/nginx:alpine"),
        ("docker.io/nginx", "docker.io/library/nginx:latest"),
        ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
        ("bitnami/redis:7", "docker.io/bitnami/redis:7"),
        ("localhost/a", "localhost/a:latest"),
        ("host/a", "docker.io/host/a:latest"),
        ("HOST/a", "HOST/a:latest"),
        ("host.example/a_b/c__d/e--f", "host.example/a_b/c__d/e--f:latest"),
        ("[::1]:5000/a:1", "[::1]:5000/a:1"),
        (f"host:5000/a/b:tag@{DIGEST}", f"host:5000/a/b:tag@{DIGEST}"),
        (f"nginx@{DIGEST}", f"docker.io/library/nginx@{DIGEST}"),
        ("docker://nginx:1.25", "docker://docker.io/library/nginx:1.25"),
        ("docker-daemon:app", "docker-daemon:docker.io/library/app:latest"),
        ("docker-daemon:app:dev", "docker-daemon:docker.io/library/app:dev"),
        (f"docker-daemon:{DIGEST}", f"docker-daemon:{DIGEST}"),
        ("oci:some/folder", "oci:some/folder"),
        ("oci:../folder:v1", "oci:../folder:v1"),
        ("oci:/abs:docker.io/library/x:1", "oci:/abs:docker.io/library/x:1"),
        ("oci-archive:a.tar:v1", "oci-archive:a.tar:v1"),
        ("docker-archive:a.tar:x/y:1", "docker-archive:a.tar:x/y:1"),
        ("dir:a:b", "dir:a:b"),
        ("containers-storage:localhost/x:1", "containers-storage:localhost/x:1"),
        ("containers-storage:[vfs@/a]x", "containers-storage:[vfs@/a]x"),
        # Names of repositories that look like transports.
        ("docker:dind", "docker.io/library/docker:dind"),
    ],
)
def test_references_are_normalised_as_docker_does(image: str, canonical: str) -> None:
    reference = parse(image)
    assert reference.canonical == canonical
    assert parse(canonical) == reference


def test_the_parts_of_references() -> None:
    assert parse("nginx") == Reference(None, "docker.io/library/nginx", "latest")
    assert parse(f"a.b/c:t@{DIGEST}") == Reference(None, "a.b/c", "t", DIGEST)
    assert parse(f"docker-daemon:{DIGEST}") == Reference("docker-daemon", digest=DIGEST)
    assert parse("oci:p:x:y") == Reference("oci", path="p", tag="x:y")
    assert parse("dir:p:x") == Reference("dir", path="p:x")
    assert parse("containers-storage:x") == Reference("containers-storage", "x")


def test_a_digest_is_asked_for_rather_than_the_tag() -> None:
    assert parse("x:t").docker_name == "docker.io/library/x:t"
    assert parse(f"x:t@{DIGEST}").docker_name == f"docker.io/library/x@{DIGEST}"
    assert parse(f"docker-daemon:{DIGEST}").docker_name == DIGEST


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("", "empty"),
        (" nginx", "blanks"),
        ("nginx\n", "control"),
        ("a b", "not an image name"),
        ("Nginx", "'Nginx' is not an image name"),
        ("foo://nginx", "unknown transport 'foo://'"),
        ("https://host/nginx", "unknown transport 'https://'"),
        ("C:\\images\\x", "C:"),
        ("nginx:", "the tag ''"),
        ("nginx:-1", "the tag '-1'"),
        ("nginx@sha512:abc", "the digest 'sha512:abc'"),
        ("nginx@", "the digest ''"),
        (f"nginx@sha256:{HEX.upper()}", "the digest"),
        (DIGEST, "image ID"),
        (f"docker://{DIGEST}", "image ID"),
        ("docker://", "not an image name"),
        ("a//b", "not an image name"),
        ("a/../b", "not an image name"),
        ("-/a", "not an image name"),
        ("host_name.x/a", "not an image name"),
        ("x" * 256, "not an image name"),
        ("docker-daemon:", "names no image"),
        ("docker-daemon://x", "no '//'"),
        ("containers-storage:", "names no image"),
        ("oci:", "incomplete"),
        ("oci::tag", "incomplete"),
        ("oci:path:", "incomplete"),
        ("dir:", "incomplete"),
    ],
)
def test_bad_references_are_refused_with_what_was_found(image: str, found: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(image)
    assert found in caught.value.message


def test_an_unknown_transport_lists_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        parse("ftp://nginx")
    assert "docker-daemon:, oci:, oci-archive:" in (caught.value.hint or "")


@given(st.text() | st.from_regex(r"\A(docker://|oci:|dir:)?[a-z./:@_-]{0,20}\Z"))
def test_any_text_is_refused_or_has_a_canonical_form(image: str) -> None:
    try:
        reference = parse(image)
    except InputError:
        return
    assert parse(reference.canonical) == reference


def test_lock_names_do_not_depend_on_where_the_workspace_is() -> None:
    names = [
        [
            lock_name(parse(image), root / "web", root)
            for image in ("oci:img:v1", "dir:../../x", "docker-archive:/w/a.tar")
        ]
        for root in (Path("/w"), Path("/w/../w/."))
    ]
    assert names[0] == ["oci:web/img:v1", "dir:../x", "docker-archive:a.tar"]
    assert names[0] == names[1]
    assert lock_name(parse("oci:img"), Path("/elsewhere/web"), Path("/elsewhere")) == "oci:web/img"
    assert lock_name(parse("nginx"), Path("/w"), Path("/w")) == "docker.io/library/nginx:latest"
    assert lock_name(parse("docker://nginx"), Path("/w"), Path("/w")) == "docker://docker.io/library/nginx:latest"
