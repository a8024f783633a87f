"""`fledge boot` with a QEMU that is a script of ours: what is judged how, and what is said about it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from fledge_tasks.boot import qemu as qemu_module
from tests.layers import Member
from tests.layouts import Place
from tests.qemus import FakeQemu, fake_qemu
from tests.tools import need
from tests.workspaces import sha256_of

SERVER = {"Entrypoint": ["/bin/server", "-p", "80"], "ExposedPorts": {"8080/tcp": {}}}


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    need("busybox", "skopeo", "mke2fs")
    monkeypatch.setattr(qemu_module, "KVM", tmp_path / "no-kvm")
    return fake_qemu(tmp_path / "qemu", monkeypatch)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "w", tmp_path)


def built(place: Place, name: str = "web", more: str = "", **config: object) -> Place:
    """Build an image with the OCI config of a server, or another one."""
    place.add(name, f"oci:../layouts/{name}", buffer_mb=1, more=more)
    place.layout(name).write([Member("bin/server", b"#!", mode=0o755)], config=config or SERVER)
    place.build()
    return place


# --- what can be booted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", ["nan", "inf", "0"])
def test_a_timeout_that_is_none(place: Place, timeout: str) -> None:
    place.add_layout("web", [Member("a")])
    result = place.fledge("boot", "web", "--timeout", timeout)
    assert result.code == 2 and "--timeout" in result.stderr


def test_an_image_that_is_not_built(place: Place, qemu: FakeQemu) -> None:
    place.add_layout("web", [Member("a")])
    result = place.fledge("boot", "web")
    assert result.code == 2
    assert result.stderr.startswith("error: web: there is nothing to boot: ")
    assert result.stderr.endswith("\n  hint: run `fledge build web`\n")
    assert qemu.calls() == []
    assert place.fledge("boot", "wbe").stderr.startswith(f'error: {place.root}: no image is named "wbe"')


def test_an_image_that_is_not_up_to_date(place: Place, qemu: FakeQemu) -> None:
    built(place).output("web").open("r+b").close()
    place.output("web").touch()
    result = place.fledge("boot", "web")
    assert (result.code, qemu.calls()) == (2, [])
    assert "there is nothing to boot: rootfs.img was changed since it was written" in result.stderr
    place.build()
    place.add("web", "oci:../layouts/web", buffer_mb=2)
    assert "there is nothing to boot: what goes in has changed" in place.fledge("boot", "web").stderr


def test_an_image_for_other_machines(place: Place, qemu: FakeQemu) -> None:
    file = place.add("web", "oci:../layouts/web") / "fledge.toml"
    file.write_text(file.read_text().replace("[source]", '[source]\nplatform = "linux/arm64"'))
    result = place.fledge("boot", "web")
    assert (result.code, qemu.calls()) == (2, [])
    assert f"{file}: source.platform: found linux/arm64, expected one of linux/amd64, linux/386" in result.stderr


def test_an_oci_config_that_is_gone(place: Place, qemu: FakeQemu) -> None:
    built(place)
    shutil.rmtree(place.root / "cache")
    result = place.fledge("boot", "web")
    assert (result.code, qemu.calls()) == (2, [])
    assert "web: its OCI config is not in the cache\n  hint: run `fledge lock web`" in result.stderr
    assert place.fledge("lock", "web").code == 0
    qemu.does("up(); serve(200)")
    assert place.fledge("boot", "web").code == 0


def test_without_qemu(place: Place, qemu: FakeQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(place)
    (tmp_path / "poor").mkdir()
    (tmp_path / "poor/busybox").symlink_to(str(shutil.which("busybox")))
    monkeypatch.setenv("PATH", str(tmp_path / "poor"))
    result = place.fledge("boot", "web")
    assert result.code == 1
    assert "error: qemu-system-x86_64 is not installed" in result.stderr
    assert "sudo apt-get install qemu-system-x86" in result.stderr
    (tmp_path / "poor/busybox").unlink()
    assert "sudo apt-get install busybox-static" in place.fledge("boot", "web").stderr
    assert qemu.calls() == []


# --- what QEMU is told -----------------------------------------------------------------------------------------


def test_the_command_line(place: Place, qemu: FakeQemu) -> None:
    built(place, more="[manifest]\nresources = { cpu_cores = 2, memory_mb = 96 }\n")
    before = sha256_of(place.output("web"))
    qemu.does("up(); serve(200)")
    assert place.fledge("boot", "web", "--offline").code == 0
    [argv] = qemu.calls()
    options = dict(itertools.pairwise(argv))
    assert options["-machine"].startswith("microvm")
    assert options["-m"] == "96"
    assert options["-kernel"].endswith("/kernel/boot/vmlinuz-6.1-cloud-amd64")
    assert options["-append"] == "console=ttyS0 reboot=t panic=-1 quiet"
    assert options["-drive"] == f"id=root,if=none,format=raw,snapshot=on,file={place.output('web')}"
    assert re.fullmatch(r"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:\d+-:8080", options["-netdev"])
    assert "-no-reboot" in argv and "-nodefaults" in argv and "-no-user-config" in argv
    assert sha256_of(place.output("web")) == before
    assert place.build().stages("web") == []


def test_a_qcow2_disk(place: Place, qemu: FakeQemu) -> None:
    need("qemu-img")
    built(place, more='[output]\nformat = "qcow2"\n')
    qemu.does("up(); serve(200)")
    assert place.fledge("boot", "web").code == 0
    [argv] = qemu.calls()
    disk = place.root / "build/web/rootfs.qcow2"
    assert f"id=root,if=none,format=qcow2,snapshot=on,file={disk}" in argv


def test_the_initramfs_reaches_qemu(place: Place, qemu: FakeQemu) -> None:
    built(place)
    copy = qemu.folder / "copy"
    qemu.does(f"""
        open({str(copy)!r}, "wb").write(open(argv[argv.index("-initrd") + 1], "rb").read())
        up(); serve(200)
    """)
    assert place.fledge("boot", "web").code == 0
    assert copy.read_bytes().startswith(b"070701")
    assert b"-p 80\n" in copy.read_bytes()


def test_an_initramfs_of_the_user(place: Place, qemu: FakeQemu, tmp_path: Path) -> None:
    built(place)
    own = tmp_path / "own"
    refused = place.fledge("boot", "web", "--initrd", str(own))
    assert (refused.code, refused.stderr) == (2, f"error: {own}: there is no such initramfs\n")
    own.write_bytes(b"")
    qemu.does('say("[    0.000000] Linux version 6.1"); serve(200)')
    result = place.fledge("boot", "web", "--initrd", str(own))
    assert result.code == 0
    [argv] = qemu.calls()
    assert argv[argv.index("-initrd") + 1] == str(own)
    assert argv[argv.index("-append") + 1].endswith(" root=/dev/vda rootfstype=ext4 rw")


def test_a_kernel_of_the_user(place: Place, qemu: FakeQemu, tmp_path: Path) -> None:
    built(place)
    own = tmp_path / "bzImage"
    refused = place.fledge("boot", "web", "--kernel", str(own))
    assert (refused.code, refused.stderr) == (2, f"error: {own}: there is no such kernel\n")
    own.write_bytes(b"")
    qemu.does("up(); serve(200)")
    result = place.fledge("boot", "web", "--kernel", str(own))
    assert result.code == 0 and "(tcg, bzImage)" in result.stdout
    assert qemu.calls()[0][qemu.calls()[0].index("-kernel") + 1] == str(own)


def test_a_port_that_somebody_was_quicker_to_take(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("""
        if len(open(log.name).readlines()) < 3:
            sys.exit("qemu: -netdev user: Could not set up host forwarding rule 'tcp:127.0.0.1:1-:80'")
        up(); serve(200)
    """)
    assert place.fledge("boot", "web").code == 0
    assert len(qemu.calls()) == 3


# --- KVM -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kvm(qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    (qemu.folder / "kvm").touch()
    monkeypatch.setattr(qemu_module, "KVM", qemu.folder / "kvm")
    monkeypatch.setattr(qemu_module, "_KVM_SECONDS", 0.5)
    return qemu


def used(qemu: FakeQemu) -> list[str]:
    return [argv[argv.index("-accel") + 1] for argv in qemu.calls()]


def test_kvm_is_used_where_it_works(place: Place, kvm: FakeQemu) -> None:
    built(place, more="[manifest]\nresources = { cpu_cores = 3 }\n")
    kvm.does("up(); serve(200)")
    result = place.fledge("boot", "web")
    assert (result.code, result.stderr) == (0, "")
    assert "(kvm, vmlinuz-6.1-cloud-amd64)" in result.stdout
    assert used(kvm) == ["kvm"]
    assert "-icount" not in kvm.calls()[0] and "-smp 3" in " ".join(kvm.calls()[0])
    assert place.fledge("boot", "web", "--accel", "tcg").code == 0
    assert used(kvm) == ["kvm", "tcg"]
    assert "-icount" in kvm.calls()[1] and "-smp" not in kvm.calls()[1]


@pytest.mark.parametrize(
    ("trouble", "note"),
    [
        ("time.sleep(100)", "nothing was heard of the guest's kernel"),
        ("say('Probing EDD'); time.sleep(100)", "nothing was heard of the guest's kernel"),
        ("sys.exit('cannot set MSR\\nand more')", "QEMU ended with 1: cannot set MSR"),
        ("sys.exit()", "QEMU ended with 0: it said nothing"),
    ],
    ids=["hangs", "hangs after its first words", "fails", "ends"],
)
def test_kvm_that_does_not_work_gives_way_to_emulation(place: Place, kvm: FakeQemu, trouble: str, note: str) -> None:
    built(place)
    kvm.does(f"""
        if accelerator == "kvm":
            {trouble}
        up(); serve(200)
    """)
    result = place.fledge("boot", "web")
    assert (result.code, result.stderr) == (0, f"note: kvm: {note} (trying tcg)\n")
    assert used(kvm) == ["kvm", "tcg"]
    only = place.fledge("boot", "web", "--accel", "kvm", "--timeout", "1")
    assert only.code == 1
    assert f"error: kvm: {note}" in only.stderr


# --- a workload that serves ------------------------------------------------------------------------------------


def test_healthy(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("up(); serve(200, '<h1>\\x1b[31mhi</h1>')")
    result = place.fledge("boot", "web", "--show")
    assert (result.code, result.stderr) == (0, "")
    line, page = result.stdout.splitlines()
    assert re.fullmatch(
        r"web: healthy: GET / at port 8080: 200 Said, \d+\.\d s \(tcg, vmlinuz-6\.1-cloud-amd64\)", line
    )
    assert page == "<h1>\\x1b[31mhi</h1>"


def test_as_json(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("up(); serve(201, 'body')")
    result = place.fledge("boot", "web", "--json")
    assert result.code == 0
    found = result.summary
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", found.pop("url"))
    assert 0 < found.pop("seconds") < 60
    # The server says what it was asked while it answers: the line may come too late for us.
    assert found.pop("console")[:2] == ["fledge: the guest is up", "fledge: the workload starts"]
    assert found == {
        "name": "web",
        "image": str(place.output("web")),
        "healthy": True,
        "text": "GET / at port 8080: 201 Said",
        "accelerator": "tcg",
        "kernel": "vmlinuz-6.1-cloud-amd64",
        "status": 201,
        "body": "body",
        "exit_code": None,
    }


@pytest.mark.parametrize(
    ("endpoint", "status", "healthy"),
    [
        (None, 200, True), (None, 404, True), (None, 500, False),
        ("/healthz?deep=1", 204, True), ("/healthz?deep=1", 302, True), ("/healthz?deep=1", 404, False),
    ],
)  # fmt: skip
def test_what_is_healthy(place: Place, qemu: FakeQemu, endpoint: str | None, status: int, healthy: bool) -> None:
    """Whoever names an endpoint wants it to be found; elsewhere an answer shows that somebody is there."""
    more = f'[manifest.health_check]\nendpoint = "{endpoint}"\n' if endpoint else ""
    built(place, more=more)
    qemu.does(f"up(); serve({status})")
    result = place.fledge("boot", "web", "--timeout", "1" if not healthy else "60")
    asked = f"GET {endpoint or '/'} at port 8080: {status} Said"
    assert result.code == int(not healthy)
    if healthy:
        assert f"web: healthy: {asked}" in result.stdout
    else:
        assert f"error: web: not healthy in time: {asked}" in result.stderr
        assert f"  | asked: GET {endpoint or '/'} HTTP/1.1\n" in result.stderr


def test_where_the_manifest_says(place: Place, qemu: FakeQemu) -> None:
    more = '[manifest]\nworkload = { base_url = "http://10.0.2.15:99/api/" }\nhealth_check = { endpoint = "up" }\n'
    built(place, more=more, Cmd=["/bin/server"])
    qemu.does("up(); serve(200)")
    result = place.fledge("boot", "web", "--json")
    assert result.summary["text"] == "GET /api/up at port 99: 200 Said"
    assert qemu.calls()[0][qemu.calls()[0].index("-netdev") + 1].endswith("-:99")


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        # A URL in a query does not make a URL of all.
        ("/health?of=http://db/", "/health?of=http://db/ at port 8080"),
        ("http://10.0.2.15:99/up", "/up at port 99"),
        ("/gesünder als/%C3%BC\\u0001", "/ges%C3%BCnder%20als/%C3%BC%01 at port 8080"),
    ],
)
def test_an_odd_endpoint(place: Place, qemu: FakeQemu, endpoint: str, asked: str) -> None:
    built(place, more=f'[manifest.health_check]\nendpoint = "{endpoint}"\n')
    qemu.does("up(); serve(200)")
    assert place.fledge("boot", "web", "--json").summary["text"] == f"GET {asked}: 200 Said"


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ('health_check = { endpoint = "http://[::1/" }', "health_check.endpoint: Invalid IPv6 URL"),
        ('health_check = { endpoint = "http://hüst/" }', "health_check.endpoint: no server can be asked for as 'hüst'"),
        ('workload = { base_url = "http://[::1/" }', "workload.base_url: Invalid IPv6 URL"),
        ('workload = { base_url = "http://a:99999/" }', "workload.base_url: Port out of range 0-65535"),
    ],
)
def test_a_url_that_is_none(place: Place, qemu: FakeQemu, more: str, error: str) -> None:
    built(place, more=f"[manifest]\n{more}\n")
    result = place.fledge("boot", "web")
    assert (result.code, qemu.calls()) == (1, [])
    assert result.stderr.startswith(f"error: web: {error}\n")


def test_it_is_asked_again_until_it_answers(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("""
        say("fledge: the guest is up"); time.sleep(0.2)
        say("fledge: the workload starts"); time.sleep(0.5)
        server = socket.create_server(("127.0.0.1", int(forwarded[1])))
        for answer in b"", b"garbage", b"HTTP/1.1 503 Wait\\r\\n\\r\\n", b"HTTP/1.1 200 OK\\r\\n\\r\\n":
            client = server.accept()[0]
            client.recv(65536)
            client.sendall(answer)
            client.close()
        time.sleep(100)
    """)
    assert place.fledge("boot", "web").code == 0


def test_a_workload_that_ends_has_failed(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("up(); say('\\x1b]0;no config\\x07'); stop(0)")
    result = place.fledge("boot", "web")
    assert result.code == 1
    assert result.stderr.startswith("error: web: the workload ended with 0, ")
    assert "  the end of its console:\n" in result.stderr
    assert "  | \\x1b]0;no config\\x07\n" in result.stderr
    assert place.fledge("boot", "web", "--json").summary["exit_code"] == 0


def test_a_guest_that_ends(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("up(); say('Kernel panic'); sys.exit()")
    result = place.fledge("boot", "web")
    assert result.code == 1
    assert result.stderr.startswith("error: web: the guest ended before its workload did, ")
    assert result.stderr.endswith("  | Kernel panic\n")


def test_a_guest_that_never_speaks(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("time.sleep(100)")
    result = place.fledge("boot", "web", "--timeout", "1")
    assert result.code == 1
    assert result.stderr == "error: tcg: nothing was heard of the guest's kernel\n  its console is empty\n"


def test_a_guest_whose_workload_never_starts(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("say('fledge: the guest is up'); time.sleep(100)")
    result = place.fledge("boot", "web", "--timeout", "1")
    assert "error: web: not healthy in time: the workload did not start" in result.stderr


def test_keep_ends_with_the_guest(place: Place, qemu: FakeQemu) -> None:
    built(place)
    qemu.does("""
        up()
        signal.signal(signal.SIGALRM, lambda *_: stop(4))
        signal.alarm(2)
        serve(200)
    """)
    result = place.fledge("boot", "web", "--keep")
    assert result.code == 1
    assert re.search(r"^web: http://127\.0\.0\.1:\d+/ until Ctrl-C$", result.stderr, re.MULTILINE)
    assert "error: web: the guest has ended" in result.stderr
    assert "  | fledge: the workload ended with 4" in result.stderr


# --- a job -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_gives_its_exit_code(place: Place, qemu: FakeQemu, code: int) -> None:
    built(place, "job", Cmd=["/bin/server"])
    qemu.does(f"say('kernel'); up(); say('42'); stop({code})")
    result = place.fledge("boot", "job")
    assert result.code == code
    assert result.stdout.startswith(f"42\r\nfledge: the workload ended with {code}\r\n")
    where = result.stderr if code else result.stdout
    assert f"job: the workload ended with {code}, " in where and "the end of its console" not in where
    assert "hostfwd" not in " ".join(qemu.calls()[0])
    found = json.loads(place.fledge("boot", "job", "--json").stdout)
    assert (found["exit_code"], found["healthy"], found["url"]) == (code, code == 0, None)


def test_a_job_that_takes_too_long(place: Place, qemu: FakeQemu) -> None:
    built(place, "job", Cmd=["/bin/server"], ExposedPorts={"53/udp": {}, "9/sctp": {}, "0/tcp": {}})
    qemu.does("up(); time.sleep(100)")
    result = place.fledge("boot", "job", "--timeout", "1")
    assert result.code == 1
    assert "error: job: the job did not end in time" in result.stderr


def test_a_program_that_cannot_be_run(place: Place, qemu: FakeQemu) -> None:
    built(place, "job", Cmd=["/bin/nothing"])
    qemu.does("up(); stop(127)")
    result = place.fledge("boot", "job")
    assert result.code == 127
    assert "error: job: the workload ended with 127 (it was not found), " in result.stderr


def test_an_argument_that_no_program_can_get(place: Place, qemu: FakeQemu) -> None:
    built(place, "job", Cmd=["/bin/server", "a\0b"])
    result = place.fledge("boot", "job")
    assert (result.code, qemu.calls()) == (1, [])
    assert result.stderr == "error: job: workload: no program can be given 'a\\x00b'\n"


def test_options_that_do_not_go_together(place: Place, qemu: FakeQemu) -> None:
    for option in ("--keep", "--show", "--json"):
        result = place.fledge("boot", "web", "--shell", option)
        assert (result.code, qemu.calls()) == (2, [])
        assert "--shell goes with none of" in result.stderr
