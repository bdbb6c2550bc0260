"""Compiling, the cache of compiled code, and what happens where either of them fails.

Most of it is seen from outside: programs in processes of their own, with a compiler that writes down its calls.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sru_rt
import tolerance
from sru_rt import abi, cache, compile_cpu, source
from sru_rt.cell import Array, Cell
from sru_rt.cells import named_cells
from sru_rt.emit import emit, struct_name
from sru_rt.errors import ArgumentError, CompileError

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
STRANGER = 54321  # a user who has no entry in the list of users
DIGEST_BYTES = 32

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX users and permissions")
needs_root = pytest.mark.skipif(not ROOT, reason="only root can give files to other users or become one")
pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")

# What programs and tests share: forward and backward on the same numbers.
WORK = """
def work(dtype="float32", L=5, B=3, d=33, **options):
    rng = np.random.default_rng(0)
    u, c0 = (rng.normal(size=shape).astype(dtype) for shape in ((L, B, 1, 3, d), (1, B, d)))
    h, c_last, saved = sru_rt.sru_recurrence(u, c0=c0, highway=False, save=True, **options)
    gradients = sru_rt.sru_backward(saved, h, c_last)
    return [np.asarray(a, "float64") for a in (h, c_last, gradients.u, gradients.c0)]
"""
exec(WORK)
PROGRAM = f"""
import json, os, sys, warnings
import numpy as np
import sru_rt
{WORK}
said, results = [], []
warnings.simplefilter("always")
warnings.showwarning = lambda message, category, *rest: said.append([category.__name__, str(message)])
exec(os.environ["CODE"])
json.dump({{"said": said, "results": [[a.tolist() for a in r] for r in results]}}, sys.stdout)
"""
ONCE = "results.append(work())"
TWICE = "results.append(work()); results.append(work('float64'))"

# A compiler that writes down its calls. It remembers what it made in this run, as most tests make the same.
RECORDER = """#!/bin/sh
case "$*" in *--version*) echo "${FAKE_VERSION:-recorder 1.0}"; exit;; esac
echo "$*" >> "$CALLS"
sleep "${SLOWER:-0}"
for made; do :; done
flags="${*%% -I*}" sources="${*#* -I}" sources="${sources%% *}"
key=$({ echo "$flags"; cat "${made%/*}"/*.cpp "$sources"/*.*; } | cksum | tr ' ' -)
if ! [ -f "$MEMORY/$key" ]; then
  c++ "$@" || exit
  cp "$made" "$MEMORY/$key.$$" && mv "$MEMORY/$key.$$" "$MEMORY/$key" || exit
fi
cp "$MEMORY/$key" "$made"
"""


@dataclass
class Machine:
    """An environment for programs: a recording compiler, a cache, a place for temporary files."""

    folder: Path
    environment: dict[str, str]

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def compilations(self) -> int:
        calls = self.folder / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def entries(self) -> list[Path]:
        return sorted(self.cache.iterdir())

    def start(self, code: str, **changes: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in (self.environment | {"CODE": code} | changes).items() if v}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=environment, cwd=self.folder, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, code: str = ONCE, **changes: str) -> Outcome:
        """Runs a program to its end, which must be a good one. Changes of the environment; "" unsets."""
        return finish(self.start(code, **changes))


@dataclass
class Outcome:
    """What a program computed, and the warnings that it gave."""

    said: list[tuple[str, str]]
    results: list[list[Any]]
    stderr: str

    def is_right(self, *dtypes: str) -> None:
        """Whether work() was done right, once for each dtype."""
        assert len(self.results) == len(dtypes)
        for got, dtype in zip(self.results, dtypes):
            for name, g, w in zip(("h", "c_last", "du", "dc0"), got, wanted(dtype)):
                tolerance.check(f"{name} in {dtype}", np.asarray(g), w, 2 * tolerance.SUM[dtype])

    def is_silent(self) -> None:
        assert not self.said
        assert not self.stderr

    def the_warning(self) -> str:
        """The text of the only warning."""
        assert [category for category, _ in self.said] == ["RuntimeWarning"], self.said
        assert not self.stderr
        return self.said[0][1]


def finish(program: subprocess.Popen[str]) -> Outcome:
    try:
        out, err = program.communicate(timeout=120)
    finally:
        program.kill()
    assert program.returncode == 0, f"status {program.returncode}\n{out[-1000:]}{err[-4000:]}"
    return Outcome(**json.loads(out), stderr=err)


def wanted(dtype: str, **options: Any) -> list[np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRU_RT_CPU", "numpy")
        return globals()["work"](dtype, **options)


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def new_machine(folder: Path, recorder: Path) -> Machine:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SRU_RT_") and k not in ("CXX", "XDG_CACHE_HOME")}
    (folder / "tmp").mkdir()
    own = {
        "SRU_RT_CACHE_DIR": str(folder / "cache"),
        "SRU_RT_CXX": str(recorder),
        "SRU_RT_CXXFLAGS": "-O0",
        "SRU_RT_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "CALLS": str(folder / "calls"),
        "MEMORY": str(recorder.parent),
        "TMPDIR": str(folder / "tmp"),
    }
    return Machine(folder, kept | own)


@pytest.fixture(scope="module")
def first_machine(tmp_path_factory) -> Machine:
    """A machine that has run work()."""
    memory = tmp_path_factory.mktemp("memory")
    script(memory / "recorder", RECORDER)
    machine = new_machine(tmp_path_factory.mktemp("first"), memory / "recorder")
    machine.run().is_silent()
    assert machine.compilations == 1
    return machine


@pytest.fixture
def machine(first_machine, tmp_path) -> Machine:
    """A machine with an empty cache."""
    return new_machine(tmp_path, Path(first_machine.environment["SRU_RT_CXX"]))


@pytest.fixture
def filled(machine, first_machine) -> Machine:
    """A machine whose cache holds the one entry that work() needs."""
    shutil.copytree(first_machine.cache, machine.cache)
    return machine


def is_whole(entry: Path) -> bool:
    content = entry.read_bytes()
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


# ----------------------------------------------------------------------------------------------------------------------
# When it compiles


def test_new_sizes_do_not_compile(machine):
    sizes = [(5, 3), (6, 3), (5, 4), (1, 1), (64, 17), (0, 3), (5, 0)]
    machine.run(f"[work(L=L, B=B, d=d) for L, B in {sizes} for d in (1, 33, 64)]").is_silent()
    assert machine.compilations == 1


def test_a_second_process_does_not_compile(machine):
    for _ in range(2):
        done = machine.run()
        done.is_right("float32")
        done.is_silent()
    assert machine.compilations == 1


def test_the_pool_is_compiled_once_for_all_kernels(machine):
    threads = "from sru_rt import launch; launch._ELEMENTS_PER_TASK = 1;"
    for _ in range(2):
        machine.run(threads + TWICE, SRU_RT_NUM_THREADS="2").is_right("float32", "float64")
    assert machine.compilations == 3


def test_threads_that_come_at_once_compile_once(machine):
    done = machine.run("""if True:
        import threading
        together = threading.Barrier(8)
        def call():
            together.wait()
            results.append(work())
        threads = [threading.Thread(target=call) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    """)
    done.is_right(*["float32"] * 8)
    assert machine.compilations == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"FAKE_VERSION": "recorder 1.1"},
        {"SRU_RT_CXXFLAGS": "-O0 -DANYTHING"},
        {"CODE": "work('float64')"},
        {"CODE": "work(activation='tanh')"},
        {"CODE": "work(reset_on='current')"},
        {"CODE": "work(dropout_mask=np.ones((3, 1, 33), 'f'))"},
        {"CODE": "work('float16', saved_dtype='float16')"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_what_the_key_depends_on(filled, changes):
    for _ in range(2):
        filled.run(**changes).is_silent()
    assert filled.compilations == 1


def test_the_key_depends_on_the_compilers_command(filled):
    other = shutil.copy(filled.environment["SRU_RT_CXX"], filled.folder / "other")
    filled.run(SRU_RT_CXX=str(other)).is_silent()
    assert filled.compilations == 1
    filled.run(SRU_RT_CXX="", CXX=str(other)).is_silent()  # another variable, the same command
    assert filled.compilations == 1


@pytest.mark.parametrize("file", ["port.h", "cpu_sweep.h", "arguments.h"])
def test_the_key_depends_on_the_sources(filled, file):
    package = Path(sru_rt.__file__).parent
    tree = filled.folder / "tree"
    shutil.copytree(package, tree / "sru_rt", ignore=shutil.ignore_patterns("__pycache__", "cuda"))
    shutil.copytree(source.cuda_dir(), tree / "sru_rt" / "cuda")
    filled.run(PYTHONPATH=str(tree)).is_silent()
    assert filled.compilations == 0, "a copy elsewhere is the same"
    with (tree / "sru_rt" / "cuda" / file).open("a") as text:
        text.write("\n// changed\n")
    filled.run(PYTHONPATH=str(tree)).is_silent()
    assert filled.compilations == 1


def test_debug_tells_what_is_compiled_and_what_is_cached(machine):
    first, second = (machine.run(SRU_RT_DEBUG="1").stderr for _ in range(2))
    assert "compiled" in first and "recorder" in first and "cache hit" not in first
    assert "cache hit" in second and "compiled" not in second


def test_a_preloaded_library_is_not_for_the_compiler(machine):
    probe = script(machine.folder / "probe", f'#!/bin/sh\nprintf %s "$LD_PRELOAD" >> preloaded\n{RECORDER}')
    machine.run("os.environ['LD_PRELOAD'] = '/does/not/exist.so'; work()", SRU_RT_CXX=probe).is_silent()
    assert (machine.folder / "preloaded").read_text() == ""


# ----------------------------------------------------------------------------------------------------------------------
# The cache, from many processes and when it is damaged


def test_many_processes_fill_an_empty_cache_at_once(machine):
    programs = [machine.start(ONCE, SLOWER="0.5") for _ in range(8)]
    for done in [finish(p) for p in programs]:
        done.is_right("float32")
        done.is_silent()
    assert machine.compilations > 1, "they did not overlap"
    (entry,) = machine.entries()
    assert entry.suffix == ".so" and is_whole(entry)
    assert not list((machine.folder / "tmp").iterdir())


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at:][1:]


DAMAGES = {
    "empty": lambda content: b"",
    "shorter than a checksum": lambda content: content[:7],
    "truncated": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "first bit flipped": lambda content: flip(content, 0),
    "bit in the code flipped": lambda content: flip(content, len(content) // 2),
    "checksum flipped": lambda content: flip(content, len(content) - 1),
    "garbage": lambda content: bytes(range(256)) * 200,
    "text": lambda content: b"not code at all\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_replaced(filled, damage):
    (entry,) = filled.entries()
    entry.write_bytes(DAMAGES[damage](entry.read_bytes()))
    done = filled.run()
    done.is_right("float32")
    done.is_silent()
    assert filled.compilations == 1
    assert filled.entries() == [entry] and is_whole(entry)


def test_many_processes_find_a_damaged_entry_at_once(filled):
    (entry,) = filled.entries()
    entry.write_bytes(entry.read_bytes()[:-100])
    for done in [finish(p) for p in [filled.start(ONCE) for _ in range(8)]]:
        done.is_right("float32")
        done.is_silent()
    assert filled.entries() == [entry] and is_whole(entry)


def test_a_damaged_entry_that_another_process_replaces_meanwhile_stays(tmp_path, monkeypatch):
    entry, made = tmp_path / "entry.so", tmp_path / "made.so"
    entry.write_bytes(b"damaged " * 10)
    entry.chmod(0o700)
    made.write_bytes(b"whole")
    sha256 = hashlib.sha256

    def sha256_and_replace(content=b""):
        monkeypatch.setattr(hashlib, "sha256", sha256)
        cache.publish(made, entry)
        return sha256(content)

    monkeypatch.setattr(hashlib, "sha256", sha256_and_replace)
    cache.find(entry)
    assert entry.exists() and is_whole(entry)


def test_an_entry_can_be_read_by_its_user_alone(filled):
    (entry,) = filled.entries()
    assert entry.stat().st_mode & 0o077 == 0
    assert filled.cache.stat().st_mode & 0o077 == 0


def test_the_cache_may_be_removed_meanwhile(machine):
    code = "import shutil; results.append(work()); shutil.rmtree(os.environ['SRU_RT_CACHE_DIR']);"
    done = machine.run(code + "results.append(work('float64'))")
    done.is_right("float32", "float64")
    done.is_silent()


# ----------------------------------------------------------------------------------------------------------------------
# A cache that cannot be trusted or used. What lies in it says so when it is loaded, by making the file MARK.

EVIL = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void loaded() { std::fclose(std::fopen(std::getenv("MARK"), "w")); }
"""


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> bytes:
    """A shared object as an entry of the cache holds it."""
    made = tmp_path_factory.mktemp("evil") / "evil.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", made], input=EVIL, text=True, check=True)
    return made.read_bytes() + hashlib.sha256(made.read_bytes()).digest()


@pytest.fixture
def robbed(filled, evil) -> Machine:
    """A machine with somebody else's code in its cache."""
    (entry,) = filled.entries()
    entry.write_bytes(evil)
    filled.environment["MARK"] = str(filled.folder / "loaded")
    return filled


def test_the_mark_is_made_where_nothing_is_wrong_with_the_cache(robbed):
    """Otherwise the tests below say nothing."""
    robbed.run("try: work()\nexcept Exception: pass")
    assert (robbed.folder / "loaded").exists()


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER)


UNSAFE = {
    "all can write to the folder": lambda folder, entry: folder.chmod(0o777),
    "the group can write to the folder": lambda folder, entry: folder.chmod(0o770),
    "all can write to the folder, but remove only their own": lambda folder, entry: folder.chmod(0o1777),
    "all can write to the entry": lambda folder, entry: entry.chmod(0o777),
    "the group can write to the entry": lambda folder, entry: entry.chmod(0o770),
    "the folder is another's": lambda folder, entry: give_away(folder),
    "the entry is another's": lambda folder, entry: give_away(entry),
}


@needs_posix
@pytest.mark.parametrize("how", [pytest.param(k, marks=needs_root if k.endswith("'s") else ()) for k in UNSAFE])
def test_code_of_others_is_never_loaded(robbed, how):
    (entry,) = robbed.entries()
    UNSAFE[how](robbed.cache, entry)
    done = robbed.run(TWICE, SRU_RT_CPU="compiled")
    assert not (robbed.folder / "loaded").exists(), "the code was loaded"
    done.is_right("float32", "float64")
    text = done.the_warning()
    assert str(robbed.cache) in text and "SRU_RT_CACHE_DIR" in text
    assert not list((robbed.folder / "tmp").iterdir()), "litter"


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def replace_by_loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def entry_to_folder(folder: Path) -> None:
    (entry,) = folder.iterdir()
    entry.unlink()
    entry.mkdir()


UNUSABLE = {
    "a file is where the folder should be": replace_by_file,
    "a link to itself is where the folder should be": replace_by_loop,
    "a folder is where the entry should be": entry_to_folder,
}


@needs_posix
@pytest.mark.parametrize("how", UNUSABLE)
def test_an_unusable_cache_is_no_obstacle(filled, how):
    UNUSABLE[how](filled.cache)
    done = filled.run(TWICE, SRU_RT_CPU="compiled")
    done.is_right("float32", "float64")
    text = done.the_warning()
    assert str(filled.cache) in text and "SRU_RT_CACHE_DIR" in text
    assert filled.compilations == 2
    assert not list((filled.folder / "tmp").iterdir()), "litter"


@needs_posix
@pytest.mark.parametrize("home", ["/dev/null", "/proc/none"])
def test_a_home_that_cannot_be_written(machine, home):
    done = machine.run(TWICE, SRU_RT_CACHE_DIR="", HOME=home, SRU_RT_CPU="compiled")
    done.is_right("float32", "float64")
    text = done.the_warning()
    assert home in text and "SRU_RT_CACHE_DIR" in text


@pytest.fixture
def strangers(machine):
    """A machine for a user without privileges: the tests' own, or a stranger that root becomes.

    Programs begin with the code `become`, which reads all modules first, and takes the sources from a copy: the
    stranger may not be allowed to read where the package is installed.
    """
    folder = Path(tempfile.mkdtemp())  # the tests' own folder is closed to others
    (folder / "tmp").mkdir(mode=0o777)
    become = ""
    if ROOT:
        shutil.copytree(source.cuda_dir(), folder / "cuda")
        subprocess.run(["chmod", "-R", "a+rX", folder / "cuda"], check=True)
        become = "import subprocess; os.environ['SRU_RT_CPU'] = 'numpy'; work(); del os.environ['SRU_RT_CPU']; "
        become += f"import pathlib; sru_rt.source.cuda_dir = lambda: pathlib.Path({str(folder / 'cuda')!r}); "
        become += f"os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER}); "
        give_away(folder)
        give_away(folder / "tmp")
    own = {"SRU_RT_CXX": "c++", "TMPDIR": str(folder / "tmp"), "SRU_RT_CACHE_DIR": str(folder / "cache")}
    yield Machine(folder, machine.environment | own), become
    shutil.rmtree(folder)


@needs_posix
def test_a_read_only_folder(strangers):
    machine, become = strangers
    machine.cache.mkdir(mode=0o500)
    if ROOT:
        give_away(machine.cache)
    done = machine.run(become + ONCE)
    done.is_right("float32")
    text = done.the_warning()
    assert str(machine.cache) in text and "SRU_RT_CACHE_DIR" in text and "anew" in text
    assert not list((machine.folder / "tmp").iterdir()), "litter"


@needs_posix
@needs_root
def test_a_user_without_a_home(strangers):
    machine, become = strangers
    done = machine.run(become + ONCE, SRU_RT_CACHE_DIR="", HOME="")
    done.is_right("float32")
    assert "SRU_RT_CACHE_DIR" in done.the_warning()


def test_no_place_to_write_at_all(machine):
    done = machine.run("import tempfile; tempfile.tempdir = '/does/not/exist';" + TWICE, SRU_RT_CACHE_DIR="/dev/null/x")
    done.is_right("float32", "float64")
    (first, cache_warning), (second, numpy_notice) = done.said
    assert first == second == "RuntimeWarning"
    assert "SRU_RT_CACHE_DIR" in cache_warning and "SRU_RT_CPU=numpy" in numpy_notice
    assert machine.compilations == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of file sizes")
@pytest.mark.parametrize("until", ["the unit", "the code", "the checksum"])
def test_a_full_disk(machine, first_machine, until):
    """A limit of file sizes stands for the full disk."""
    (entry,) = first_machine.entries()
    room = {"the unit": 0, "the code": 10_000, "the checksum": entry.stat().st_size - DIGEST_BYTES // 2}[until]
    done = machine.run(f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}));" + ONCE)
    done.is_right("float32")
    first, *rest = [text for _, text in done.said]
    if until == "the code":
        assert "compiler failed" in first and not rest
    else:
        assert "SRU_RT_CACHE_DIR" in first
        assert ["SRU_RT_CPU=numpy" in text for text in rest] == [True] * (until == "the unit")
    assert not machine.entries()
    assert not list((machine.folder / "tmp").iterdir()), "litter"


# ----------------------------------------------------------------------------------------------------------------------
# Without a compiler, or with one that fails

CAUGHT = """
for _ in range(2):
    try:
        work()
    except sru_rt.errors.CompileError as error:
        said.append(["CompileError", str(error)])
"""


@pytest.fixture
def bare(machine) -> Machine:
    """A machine without a compiler."""
    machine.environment |= {"PATH": "/nonexistent"}
    del machine.environment["SRU_RT_CXX"]
    return machine


def test_without_a_compiler_numpy_does_it(bare):
    done = bare.run(TWICE + "; results.append(work(activation='identity'))")
    done.is_right("float32", "float64", "float32")
    text = done.the_warning()
    for way_on in ("apt-get install g++", "SRU_RT_CXX", "NumPy", "SRU_RT_CPU=numpy"):
        assert way_on in text
    assert not bare.cache.exists()


def test_numpy_can_be_asked_for(machine):
    done = machine.run(TWICE, SRU_RT_CPU="numpy")
    done.is_right("float32", "float64")
    done.is_silent()
    assert machine.compilations == 0
    assert not machine.cache.exists()


def test_compiled_kernels_can_be_insisted_on(bare):
    done = bare.run(CAUGHT, SRU_RT_CPU="compiled")
    assert [kind for kind, _ in done.said] == ["CompileError"] * 2
    assert "SRU_RT_CXX" in done.said[0][1]


FAILING = {
    "cannot tell its version": ("#!/bin/sh\necho no version today >&2; exit 1", "no version today"),
    "fails at length": (
        "#!/bin/sh\necho version 1; case $* in *-o*) echo no luck today; yes and so on | head -n 5000; exit 3;; esac",
        "no luck today",
    ),
    "fails": ("#!/bin/sh\necho version 1; case $* in *-o*) echo no luck today >&2; exit 3;; esac", "no luck today"),
    "is killed": ("#!/bin/sh\necho version 1; case $* in *-o*) kill -9 $$;; esac", "status -9"),
    "makes nothing": ("#!/bin/sh\necho version 1", "version 1"),
    "makes no code": ("#!/bin/sh\necho version 1; for made; do :; done; echo nonsense > $made", "cannot be loaded"),
    "makes nothing of ours": (
        '#!/bin/sh\necho version 1; for made; do :; done; case "$*" in *-o*)'
        ' echo "int nothing;" | c++ -shared -fPIC -x c++ - -o $made;; esac',
        "forward",
    ),
}


@pytest.mark.parametrize("how", FAILING)
def test_a_compiler_that_fails(machine, how):
    text, says = FAILING[how]
    failing = script(machine.folder / "failing", text)
    done = machine.run(ONCE + ";" + ONCE, SRU_RT_CXX=failing)
    done.is_right("float32", "float32")
    message = done.the_warning()
    assert failing in message or "cannot be loaded" in message
    assert says in message and "SRU_RT_C" in message

    insisting = machine.run(CAUGHT, SRU_RT_CXX=failing, SRU_RT_CPU="compiled")
    assert [kind for kind, _ in insisting.said] == ["CompileError"] * 2
    assert says in insisting.said[0][1]

    # The compiler is mended, and says the same of itself.
    mended = '#!/bin/sh\ncase "$*" in *--version*) echo version 1;; *) exec c++ "$@";; esac'
    script(machine.folder / "failing", mended)
    done = machine.run(SRU_RT_CXX=failing, SRU_RT_CPU="compiled")
    done.is_right("float32")
    done.is_silent()


@pytest.mark.parametrize("command", ["/does/not/exist", "does-not-exist++", "false"])
@pytest.mark.parametrize("variable", ["SRU_RT_CXX", "CXX"])
def test_a_command_that_is_no_compiler(machine, command, variable):
    done = machine.run(TWICE, **{"SRU_RT_CXX": "", variable: command})
    done.is_right("float32", "float64")
    assert command in done.the_warning()


def test_a_command_of_several_words(machine):
    script(machine.folder / "wrapper", '#!/bin/sh\nshift; exec "$@"')
    command = f"'{machine.folder}/wrapper' --quiet {machine.environment['SRU_RT_CXX']}"
    machine.run(SRU_RT_CXX=command, SRU_RT_CPU="compiled").is_right("float32")
    assert machine.compilations == 1


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    "variable, value",
    [
        ("SRU_RT_CPU", "x"),
        ("SRU_RT_CPU", "Compiled"),
        *itertools.product(["SRU_RT_NUM_THREADS", "OMP_NUM_THREADS"], ["0", "abc", "-1", "2.5", "²"]),
    ],
)
def test_a_bad_setting_is_named(monkeypatch, variable, value):
    monkeypatch.delenv("SRU_RT_NUM_THREADS", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ArgumentError, match=variable) as caught:
        globals()["work"]()
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("variable", ["SRU_RT_CXX", "CXX"])
def test_a_command_that_cannot_be_read_is_named(monkeypatch, variable):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    monkeypatch.delenv("SRU_RT_CXX", raising=False)
    monkeypatch.setenv(variable, "'g++")
    with pytest.raises(ArgumentError, match=variable):
        compile_cpu.compiler()


def test_blanks_are_no_command(monkeypatch):
    monkeypatch.setenv("SRU_RT_CXX", " ")
    monkeypatch.setenv("CXX", " ")
    assert compile_cpu.compiler().command[0] in ("c++", "g++", "clang++")


# ----------------------------------------------------------------------------------------------------------------------
# The structs that C++ and Python share

COUNTS = [  # gates, inputs, per_sequence, params, state, constants
    (1, 0, 0, 0, 1, 0),
    (3, 1, 0, 4, 1, 1),
    (2, 0, 1, 1, 2, 0),
    (1, 3, 2, 0, 3, 2),
    (4, 2, 0, 2, 1, 3),
]


def hand_made(counts: tuple[int, ...]) -> Cell:
    """A cell with so many values of each kind."""
    kinds = ("gates", "inputs", "per_sequence", "params", "state")
    names = {kind: tuple(f"{kind}{i}" for i in range(n)) for kind, n in zip(kinds, counts)}
    declared = []
    for kind, members in names.items():
        together = [members] if kind in ("gates", "params") and members else [(name,) for name in members]
        declared += [Array(group[0], kind, group) for group in together]

    def step(**values):
        total = sum(values.values())
        return *(values[name] + total for name in names["state"]), total

    name = "cell_" + "_".join(map(str, counts))
    return Cell(name, step, tuple(declared), tuple(f"constant{i}" for i in range(counts[5])))


def numbered(counts: tuple[int, ...], forward: bool) -> tuple[Any, list[int]]:
    """Arguments whose fields are numbered from 1 in the order of cuda/arguments.h, and the numbers."""
    number = itertools.count(1)
    gates, inputs, per_sequence, params, state, constants = counts

    def take(n: int) -> list[int]:
        return list(itertools.islice(number, n))

    def slots(n: int) -> list[abi.Slot]:
        return [abi.Slot(next(number), next(number)) for _ in range(n)]

    first = dict(zip(("L", "B", "D", "d", "every", "lengths", "mask", "reset"), take(8)))
    kinds = {"gates": gates, "inputs": inputs, "per_sequence": per_sequence, "params": params}
    first |= {kind: slots(n) for kind, n in kinds.items()}
    first |= {"c0": take(state), "constants": [float(i) for i in take(constants)]}
    given = abi.Given(**first, **dict(zip(("chunk", "carry"), take(2))))
    if forward:
        own = {"h": next(number), "c_last": take(state), "saved": take(state)}
        own |= dict(zip(("x", "weight", "d_in"), take(3)))
        arguments: Any = abi.Forward(given=given, **own)
    else:
        own = {"dh": next(number), "dc_last": take(state), "saved": take(state), "states": take(state)}
        own |= {"partial": abi.Slot(next(number), next(number))} | {f"d{kind}": slots(n) for kind, n in kinds.items()}
        arguments = abi.Backward(given=given, **own, dc0=take(state), saved_chunk=next(number))
    return arguments, list(range(1, next(number)))


@pytest.fixture(scope="module")
def fields() -> ctypes.CDLL:
    """The C++ side's view of the structs of all hand-made cells."""
    text = (Path(__file__).parent / "cpp" / "abi_fields.cpp").read_text()
    for counts in COUNTS:
        cell = hand_made(counts)
        kinds = ("gates", "inputs", "per_sequence", "params", "state", "constants")
        values = ", ".join(f"n_{kind} = {n}" for kind, n in zip(kinds, counts))
        text += f"struct {cell.name} {{ static constexpr int {values}; }};\nSRU_FIELDS({cell.name})\n"
    return compile_cpu.load(text)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_fields_arrive_where_they_were_put(counts, forward, fields):
    cell = hand_made(counts)
    arguments, numbers = numbered(counts, forward)
    packed = abi.pack(cell, arguments)
    list_fields = getattr(fields, f"{'forward' if forward else 'backward'}_{cell.name}")
    list_fields.restype = ctypes.c_longlong
    found, size = (ctypes.c_longlong * 200)(), ctypes.c_longlong()
    n = list_fields(packed, found, ctypes.byref(size))
    assert size.value == len(packed)
    assert list(found[:n]) == numbers


@pytest.mark.parametrize("counts", [COUNTS[0], COUNTS[3]], ids=str)
def test_sizes_are_compared_when_a_kernel_is_loaded(counts, monkeypatch):
    assert compile_cpu.kernel(hand_made(counts), "float32", "float32", 0)
    pack = abi.layout(hand_made(counts), True)
    monkeypatch.setattr(abi, "layout", lambda cell, forward: type(pack)(pack.format + "q"))
    with pytest.raises(CompileError, match="disagree"):
        compile_cpu.kernel(hand_made(counts), "float32", "float32", 0)


# ----------------------------------------------------------------------------------------------------------------------
# The text


WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi")


def warnings_of(unit: str, folder: Path, *more: str) -> list[str]:
    """What the compiler says of a unit and what it includes, but for what it says of its own headers."""
    found = compile_cpu.compiler()
    flags = [flag for flag in found.flags if flag not in ("-w", "-shared")]
    path = folder / f"{hashlib.sha256(unit.encode()).hexdigest()}.cpp"
    path.write_text(unit)
    command = [*found.command, *flags, *WARNINGS, f"-I{source.cuda_dir()}", f"-I{folder}", *more]
    done = subprocess.run([*command, "-c", path, "-o", path.with_suffix(".o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = (str(source.cuda_dir()), str(folder))
    return [line for line in done.stderr.splitlines() if "warning:" in line and line.startswith(ours)]


@pytest.mark.parametrize("command", ["g++", "clang++"])
def test_named_cells_compile_without_warnings(command, tmp_path, monkeypatch):
    if not shutil.which(command):
        pytest.skip(f"{command} is not installed")
    monkeypatch.setenv("SRU_RT_CXX", command)
    cells = named_cells()
    for cell in cells:
        (tmp_path / f"{cell.name}.h").write_text(emit(cell))
    included = "".join(f'#include "{cell.name}.h"\n' for cell in cells)

    def sweeps(dtype: str) -> str:
        lines = [f"template struct CpuSweep<{struct_name(cell)}, {dtype}, float, 0u>;\n" for cell in cells]
        return f'#include "cpu_sweep.h"\n{included}{"".join(lines)}'

    def unit(name: str, dtype: str) -> str:
        return source.cpu_kernel(f'#include "{name}.h"', f"{name}_cell", dtype, "float32", 0)

    # Some whole units as they are compiled, and the sweeps of all cells as far as most warnings need.
    jobs = [
        (sweeps("float"), tmp_path, "-O1"),
        (unit("sru", "float32"), tmp_path),
        (unit("sru_v_per_step_dropout", "bfloat16"), tmp_path),
        (sweeps("bfloat16"), tmp_path, "-fsyntax-only"),
        (source.pool(), tmp_path),
        (source.turn(), tmp_path),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        said = list(itertools.chain(*workers.map(lambda job: warnings_of(*job), jobs)))
    assert not said


def test_a_warning_would_be_seen(tmp_path):
    unit = '#include "cpu_sweep.h"\nstatic int nobody_calls_this(int a) { return a; }\n'
    assert "nobody_calls_this" in warnings_of(unit, tmp_path)[0]
    text = "template <class T> struct Sweep { static int run(T a) { int b; return int(a); } };\n"
    (tmp_path / "with_warning.h").write_text(text)
    unit = '#include "with_warning.h"\ntemplate struct Sweep<float>;\n'
    assert "unused variable" in warnings_of(unit, tmp_path, "-fsyntax-only")[0]


def features() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return set()


ARCHITECTURES = {"x86-64": {"sse2"}, "haswell": {"avx2", "fma", "bmi2"}, "native": set()}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are widths of x86-64")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_vector_width_computes_the_same(machine, architecture):
    if not ARCHITECTURES[architecture] <= features():
        pytest.skip(f"this processor is no {architecture}")
    flags = f"-O1 -march={architecture}"
    code = "[results.append(work(t, L=20, d=70, activation='tanh')) for t in ('float32', 'float64', 'float16')]"
    done = machine.run(code, SRU_RT_CXXFLAGS=flags, SRU_RT_CPU="compiled")
    assert f" {flags} " in (machine.folder / "calls").read_text()
    for got, dtype in zip(done.results, ("float32", "float64", "float16"), strict=True):
        for name, g, w in zip(("h", "c_last", "du", "dc0"), got, wanted(dtype, L=20, d=70, activation="tanh")):
            tolerance.check(f"{name} in {dtype}", np.asarray(g), w, 2 * tolerance.SUM[dtype])
