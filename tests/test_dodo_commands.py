"""Every command of doit in a workspace, new and built, in every mode of running: what ran, what it left and said.

Python 3.12 warns of a fork beside threads, 3.13 of databases that nobody closed, and any warning is
an error here. Python 3.14 starts processes by way of a server, which our workers must not depend on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.dodos import GROUPS, DodoPlace, Run, all_modes, installed, make_place, processes, two_modes

pytestmark = installed

LAST = {f"{stage}:{name}" for stage in ("assemble", "manifest") for name in ("web", "api")}
FORKSERVER = """
import multiprocessing.forkserver

def refuse(fds):
    raise AssertionError("a worker was to be started by the server")

multiprocessing.set_start_method("forkserver")
multiprocessing.forkserver.connect_to_new_process = refuse
"""


@pytest.fixture
def place(tmp_path: Path) -> DodoPlace:
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> DodoPlace:
    """A workspace that is built, for commands that change nothing."""
    place = make_place(tmp_path_factory.mktemp("built"))
    place.build()
    return place


def state(place: DodoPlace) -> dict[str, int]:
    """Return all files but the index, which is rewritten at will, with their times."""
    files = [path for path in place.root.rglob("*") if path.is_file() and "index" not in path.parts]
    return {str(path.relative_to(place.root)): path.stat().st_mtime_ns for path in files if "leases" not in path.parts}


def same_as_fledge(place: DodoPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tell whether `fledge build`, with nothing but the sources, makes the files that are there."""
    results = place.results()
    assert len(results) == 5
    assert place.build().stages("web") == []
    shutil.rmtree(place.root / "build")
    (place.root / "fledge.lock").unlink()
    monkeypatch.setenv("FLEDGE_CACHE_DIR", str(tmp_path / "other"))
    place.build()
    return place.results() == results


# --- running ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["", FORKSERVER], ids=["fork", "forkserver"])
@all_modes
def test_bare_doit(
    place: DodoPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: tuple[str, ...], method: str
) -> None:
    place.write_dodo(method)
    assert place.doit(*mode).began == place.tasks("web", "api")
    again = place.doit(*mode)
    assert (again.ran, again.fresh) == (set(), LAST)
    assert list(place.root.glob(".doit*")) == []
    assert same_as_fledge(place, tmp_path, monkeypatch)


def _running(place: DodoPlace) -> dict[tuple[str, ...], set[str]]:
    """Return what runs in a new workspace, by arguments."""
    every, web = place.tasks("web", "api"), place.tasks("web")

    def up_to(*stages: str) -> set[str]:
        return {task for task in every if task.partition(":")[0] in stages}

    return {
        ("--continue", "manifest:web", "build:api"): every,
        ("build:web",): web,
        ("resolve",): up_to("resolve"),
        ("fetch",): up_to("resolve", "fetch"),
        ("unpack",): up_to("resolve", "fetch", "unpack"),
        ("mkfs:*",): every - LAST,
        ("assemble:web",): web - {"manifest:web"},
    }


@processes
def test_tasks_of_a_new_workspace(tmp_path: Path, mode: tuple[str, ...]) -> None:
    """Their layers are not known before they are resolved, so the tasks of these are made while doit runs."""
    for number, (arguments, tasks) in enumerate(_running(make_place(tmp_path / "any")).items()):
        place = make_place(tmp_path / str(number))
        assert place.doit("run", *mode, *arguments).began == tasks, arguments
        assert place.doit(*arguments).ran == set(), arguments


@two_modes
def test_whatever_is_up_to_date(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.build()
    before = place.results()
    assert place.doit(*mode, "--always-execute").ran == place.tasks("web", "api")
    assert place.results() == before


def test_a_task_alone(place: DodoPlace) -> None:
    """`--single` takes the dependencies of a task away; what it needs to run it still gets."""
    assert place.doit("--single", "mkfs:web").began == place.tasks("web") - LAST


@two_modes
def test_a_restored_cache(place: DodoPlace, tmp_path: Path, mode: tuple[str, ...]) -> None:
    """What CI does: the cache is another folder, with new times; the lock file was checked out."""
    place.doit()
    before = place.results()
    shutil.copytree(place.root / "cache", tmp_path / "restored", copy_function=shutil.copyfile)
    shutil.rmtree(place.root / "cache")
    shutil.rmtree(place.root / "build")
    cache = {"FLEDGE_CACHE_DIR": str(tmp_path / "restored")}
    assert place.doit(*mode, env=cache).ran == LAST
    assert place.results() == before
    assert place.doit(*mode, env=cache).ran == set()


def test_a_layer_by_its_name(place: DodoPlace) -> None:
    layer = place.web_layers[0]
    unknown = place.start(f"unpack:{layer}")
    assert "Invalid parameter" in unknown.communicate(timeout=60)[1]
    assert unknown.returncode == 3  # doit knows no such task before the image is resolved
    place.doit("resolve")
    assert place.doit(f"unpack:{layer}").ran == {f"fetch:{layer}", f"unpack:{layer}"}


def test_reporters(place: DodoPlace) -> None:
    out = place.doit("-r", "executed-only").out.splitlines()
    assert {line[3:] for line in out} <= place.tasks("web", "api")
    assert '"result": "up-to-date"' in place.doit("-r", "json", "-n", "2").out
    assert place.doit("-r", "zero").out == ""
    assert place.doit("-o", "report").out == ""
    assert "-- manifest:web" in (place.root / "report").read_text()


# --- asking -------------------------------------------------------------------------------------------


def listed(run: Run) -> dict[str, str]:
    """Return the statuses that `list -s` shows, by task."""
    return {line.split()[1]: line.split()[0] for line in run.out.splitlines()}


def test_list_of_a_new_workspace(place: DodoPlace) -> None:
    assert [line.split()[0] for line in place.doit("list").out.splitlines()] == list(GROUPS)
    expected = set(GROUPS) | {
        f"{stage}:{name}" for stage in set(GROUPS) - {"fetch", "unpack", "verity"} for name in ("web", "api")
    }
    assert listed(place.doit("list", "--all", "-s")) == dict.fromkeys(expected, "R")
    place.doit("list", "--all", "--deps", "-p", "-q")
    assert not (place.root / "fledge.lock").exists()
    assert not (place.root / "build").exists()


def test_list_of_a_built_workspace(built: DodoPlace) -> None:
    before = state(built)
    every = dict.fromkeys(built.tasks("web", "api"), "U") | dict.fromkeys([*GROUPS, "build:web", "build:api"], "R")
    assert listed(built.doit("list", "--all", "-s")) == every
    assert built.doit("list", "-q", "--all", "mkfs").out.split() == ["mkfs", "mkfs:api", "mkfs:web"]
    assert state(built) == before


def test_info(place: DodoPlace, built: DodoPlace) -> None:
    for task in ["mkfs", "build:web", "mkfs:web", "manifest:api", f"unpack:{built.web_layers[0]}"]:
        has_actions = task in built.tasks("web", "api")
        run = built.doit("info", task, code=0 if has_actions else 1)
        assert ("status     : up-to-date" in run.out) == has_actions
    run = place.doit("info", "mkfs:web", code=1)
    assert "status     : run" in run.out
    assert "`fledge explain` tells" in run.out
    assert " object at 0x" not in run.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build:wbe",), 'hint: did you mean "build:web"?'),
        (("-n", "4", "biuld"), 'hint: did you mean "build"?'),
        (("run", "mkfs:ap"), 'command `run` invalid parameter: "mkfs:ap"'),
        (("no-such-thing",), 'Invalid parameter: "no-such-thing". Must be a command, task, or a target.'),
        (("list", "build:wbe"), "'build:wbe' is not a task"),
        (("info", "build:wbe"), "'build:wbe' is not a task"),
        (("info", "build:web", "build:api"), "must select *one* task"),
        (("clean", "build:wbe"), "'build:wbe' is not a task"),
        (("forget", "build:wbe"), "'build:wbe' is not a task"),
        (("ignore", "build:wbe"), "'build:wbe' is not a task"),
        (("reset-dep", "build:wbe"), "'build:wbe' is not a task"),
        (("ignore", "build:web"), "build:web cannot be ignored: nothing is kept for the next run"),
        (("strace",), "must select *one* task to strace"),
        (("auto",), "Must be a command, task, or a target"),  # it is no command of this doit any more
        (("-n", "many"), "Error parsing parameter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be(built: DodoPlace, arguments: tuple[str, ...], message: str) -> None:
    before = state(built)
    process = built.start(*arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "")
    assert message in err
    assert err.startswith("ERROR: ")
    assert "Traceback" not in err
    assert state(built) == before


def test_hidden_names_are_no_hints(place: DodoPlace) -> None:
    process = place.start("layers:web")
    assert 'did you mean "_' not in process.communicate(timeout=60)[1]
    assert process.returncode == 3


# --- changing -----------------------------------------------------------------------------------------


def test_clean(place: DodoPlace) -> None:
    assert "Failed" not in place.doit("clean").out  # nothing is there yet
    place.doit()
    results = place.results()
    for arguments in (("clean", "--dry-run"), ("clean", "-n", "-a"), ("clean", "-c", "mkfs:web")):
        place.doit(*arguments)
        assert place.results() == results
    place.doit("clean", "assemble:web")
    assert sorted(set(results) - set(place.results())) == ["build/web/rootfs.img"]
    assert place.doit().ran == {"assemble:web"}  # the manifest still describes it
    place.doit("clean", "-c", "build:api")
    assert sorted(set(results) - set(place.results())) == ["build/api/manifest.json", "build/api/rootfs.img"]
    for everything in (("clean",), ("clean", "-a", "--forget")):
        place.doit()
        assert place.results() == results
        place.doit(*everything)
        assert place.results().keys() == {"fledge.lock"}
    assert place.doit("-n", "4").ran == LAST


def test_what_cannot_be_cleaned(place: DodoPlace) -> None:
    (place.output("web") / "of the user").mkdir(parents=True)
    process = place.start("clean")
    _, err = process.communicate(timeout=60)
    assert f"error: [Errno 21] Is a directory: '{place.output('web')}'" in err
    assert "Traceback" not in err


def test_nothing_can_be_forgotten(built: DodoPlace) -> None:
    before = state(built)
    for arguments in (
        ("forget",),
        ("forget", "-a"),
        ("forget", "-s", "build:web"),
        ("reset-dep",),
        ("reset-dep", "mkfs"),
    ):
        built.doit(*arguments)
    assert built.doit().ran == set()
    assert state(built) == before


def test_strace(built: DodoPlace) -> None:
    """doit traces programs that are actions; ours are none, so it runs the task and has nothing to tell."""
    run = built.doit("strace", "mkfs:web")
    assert run.ran == {"mkfs:web", "strace_report"}
    assert not (built.root / "strace.txt").exists()


def test_help(built: DodoPlace) -> None:
    assert "mkfs web" in built.doit("help", "mkfs:web").out
    assert "OPTIONS" in built.doit("help", "run").out
    assert "complete" in built.doit("tabcompletion").out


# --- places -------------------------------------------------------------------------------------------


def test_from_another_folder(place: DodoPlace) -> None:
    below, dodo = place.root / "web", str(place.root / "dodo.py")
    assert place.doit("-k", "mkfs:api", cwd=below).ran == place.tasks("api") - LAST
    assert place.doit("-f", "../dodo.py", "build:api", cwd=below).ran == LAST & place.tasks("api")
    assert place.doit("-f", dodo, "-n", "4", "build:web", cwd=Path("/")).began == place.tasks("web") - {
        f"{stage}:{place.web_layers[0]}" for stage in ("fetch", "unpack")
    }
    assert place.doit("list", "-f", dodo, cwd=Path("/")).out
    lost = place.start(cwd=below)
    assert "Could not find dodo file" in lost.communicate(timeout=60)[1]
    assert lost.returncode == 3
    assert place.build().stages("web") == []


def test_a_dodo_of_another_folder(place: DodoPlace, tmp_path: Path) -> None:
    """One dodo.py may serve many workspaces: `-d` says which."""
    shared = tmp_path / "shared" / "dodo.py"
    shared.parent.mkdir()
    (place.root / "dodo.py").rename(shared)
    assert place.doit("-f", str(shared), "-d", str(place.root), cwd=tmp_path).began == place.tasks("web", "api")
    run = place.start("-f", str(shared), cwd=tmp_path)
    assert f"error: {shared.parent}: found no fledge.toml" in run.communicate(timeout=60)[1]
    assert run.returncode == 2


def test_a_relative_cache_is_relative_to_the_caller(place: DodoPlace, tmp_path: Path) -> None:
    env = {"FLEDGE_CACHE_DIR": "mine"}
    place.doit("-f", str(place.root / "dodo.py"), cwd=tmp_path, env=env)
    assert (tmp_path / "mine" / "objects").is_dir()
    assert not (place.root / "mine").exists()
    assert place.doit("-f", str(place.root / "dodo.py"), "-n", "2", cwd=tmp_path, env=env).ran == set()


@pytest.mark.parametrize("command", [(), ("-n", "4"), ("list",), ("info", "mkfs:web")])
def test_a_broken_workspace(place: DodoPlace, command: tuple[str, ...]) -> None:
    place.build()
    before = place.results()
    (place.root / "web" / "fledge.toml").write_text("version = 1\n")
    process = place.start(*command)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: web/fledge.toml: version: found integer 1")
    assert "Traceback" not in err
    assert place.results() == before
    shutil.rmtree(place.root / "web")
    shutil.rmtree(place.root / "api")
    process = place.start(*command)
    assert "error: " in process.communicate(timeout=60)[1]
    assert process.returncode == 2


def test_settings_of_doit_in_pyproject(place: DodoPlace) -> None:
    """Those that are also set by us have no effect; no other may change what is built."""
    (place.root / "pyproject.toml").write_text(
        '[tool.doit]\nbackend = "json"\ndep_file = "state"\nverbosity = 2\ndefault_tasks = ["mkfs:web"]\n'
        'num_process = 3\npar_type = "thread"\ncontinue = true\ncheck_file_uptodate = "timestamp"\n'
        "[tool.doit.commands.list]\nstatus = true\n"
    )
    assert place.doit().began == place.tasks("web", "api")
    assert place.doit().ran == set()
    assert list(place.root.glob("state*")) == []
    assert listed(place.doit("list"))["mkfs"] == "R"


def test_names_of_images_are_names_of_tasks(place: DodoPlace) -> None:
    """doit takes `name=value` for a variable and `*` for a pattern, so no image may be called so."""
    file = place.root / "web" / "fledge.toml"
    text = file.read_text()
    for name in ("a=b", "a*", "a:b", "-a", "a b", "_a"):
        file.write_text(text + f'[manifest]\nname = "{name}"\n')
        process = place.start("list", "--all")
        assert "manifest.name" in process.communicate(timeout=60)[1]
        assert process.returncode == 2
