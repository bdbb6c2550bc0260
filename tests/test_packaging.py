"""What users install: wheel, sdist and editable install are built, opened, installed and run elsewhere."""

from __future__ import annotations

import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import sru_rt

ROOT = Path(__file__).resolve().parent.parent
# Where the folders of the tree are in the package.
PACKAGE = {"sru_rt": "sru_rt", "bindings": "sru_rt/bindings", "cuda": "sru_rt/cuda"}
LITTER = shutil.ignore_patterns(
    ".git", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Runs a command, which must succeed; returns what it wrote to standard output."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project, so that building leaves nothing in the real one."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "project", ignore=LITTER))


@pytest.fixture(scope="module")
def dist(tree, tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel built from it, and the wheel built from the tree."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, out, cwd=tree)
    run(*build, out / "direct", "--wheel", cwd=tree)
    (sdist,), (wheel,), (direct,) = out.glob("*.tar.gz"), out.glob("*.whl"), (out / "direct").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "wheel from the tree": direct}


def sources(root: Path) -> set[str]:
    """Every file of the package in the tree, by its name in the package."""
    return {
        f"{package}/{path.relative_to(root / folder).as_posix()}"
        for folder, package in PACKAGE.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


# ---------------------------------------------------------------------------------------------------------
# What is in the archives


@pytest.mark.parametrize("which", ["wheel", "wheel from the tree"])
def test_wheel_holds_every_source_and_nothing_else(dist, tree, which):
    with zipfile.ZipFile(dist[which]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = sources(tree)
    assert {"sru_rt/__init__.py", "sru_rt/bindings/__init__.py", "sru_rt/cuda/port.h"} <= expected
    assert names == expected


def test_wheel_is_pure(dist):
    assert dist["wheel"].name == f"sru_rt-{sru_rt.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(dist["wheel"]) as wheel:
        (about,) = [name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: true" in wheel.read(about).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_sdist_holds_the_project(dist, tree):
    """Someone who has the sdist only can run the tests and the examples, and can read the documentation."""
    with tarfile.open(dist["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(tree).as_posix()
        for folder in (*PACKAGE, "tests", "examples", "benchmarks", "docs", "tools", ".ci")
        for path in (tree / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "CITATION.cff",
        "constraints.txt",
        "setup.cfg",
        "pyproject.toml",
    }
    assert wanted - names == set()


def test_metadata(dist):
    with zipfile.ZipFile(dist["wheel"]) as wheel:
        (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_string(wheel.read(path).decode())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.partition(">")[0] for line in required] == ["numpy"], "numpy alone is needed at run time"
    assert metadata["Version"] == sru_rt.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras >= {"cuda12", "cuda13", "torch", "jax", "bench", "examples", "test", "dev"}
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_one_version_everywhere():
    assert importlib.metadata.version("sru_rt") == sru_rt.__version__
    assert f"\nversion: {sru_rt.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changes.splitlines() if line.startswith("## "))
    assert newest.startswith(("## Unreleased", f"## {sru_rt.__version__}"))


def test_cuda_is_a_folder_and_no_package():
    """An __init__.py would hide NVIDIA's `cuda` package, which CuPy imports, from scripts run at the root."""
    assert not (ROOT / "cuda" / "__init__.py").exists()
    assert {path.suffix for path in (ROOT / "cuda").rglob("*") if path.is_file()} <= {".h", ".cuh", ".cpp"}


# ---------------------------------------------------------------------------------------------------------
# Installed and run

# A recurrence, compared with its equation, in a process that has only numpy and what was installed.
PROBE = """
    import sys
    from pathlib import Path

    import numpy as np

    import sru_rt

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    L, B, d = 5, 2, 3
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((L, B, d)), rng.standard_normal((1, 3, d, d))
    bias, v = rng.standard_normal((1, 2, d)), rng.standard_normal((1, 2, d))
    u = np.einsum("lbi,koi->lbko", x, weight[0])
    c = np.zeros((B, d))
    for t in range(L):
        f = sigmoid(u[t, :, 1] + v[0, 0] * c + bias[0, 0])
        r = sigmoid(u[t, :, 2] + v[0, 1] * c + bias[0, 1])
        c = f * c + (1 - f) * u[t, :, 0]
    h, c_last = sru_rt.sru_forward(x, weight, bias, v)
    assert np.allclose(h[-1], r * c + (1 - r) * x[-1], rtol=1e-12), (h[-1], r * c + (1 - r) * x[-1])
    assert np.allclose(c_last[0], c, rtol=1e-12), (c_last, c)

    import sru_rt.bindings
    print(Path(sru_rt.__file__).parent)
"""


def link_into(site: Path, *distributions: str) -> None:
    """Makes installed packages visible in another environment, so that nothing is fetched."""
    for distribution in distributions:
        for top in {file.parts[0] for file in importlib.metadata.files(distribution)} - {"..", "__pycache__"}:
            (site / top).symlink_to(importlib.metadata.distribution(distribution).locate_file(top))


def new_environment(folder: Path) -> tuple[Path, Path]:
    """A virtual environment that has numpy and setuptools: its Python and its site-packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    link_into(site, "numpy", "setuptools")
    return python, site


def surround(here: Path, site: Path) -> None:
    """Puts a `cuda` beside a user's script and NVIDIA's in site-packages, both with a port.h."""
    for folder in (here / "cuda", site / "cuda" / "pathfinder"):
        folder.mkdir(parents=True)
        (folder.parent / "port.h").write_text("#error this is not the port.h of sru_rt\n")
        (folder / "port.h").write_text("#error this is not the port.h of sru_rt\n")
    (here / "cuda" / "__init__.py").write_text("raise ImportError('sru_rt has no reason to import cuda')\n")
    (site / "cuda" / "pathfinder" / "__init__.py").write_text("NAME = 'pathfinder'\n")


def clean_env(home: Path) -> dict[str, str]:
    """The environment of a user who has set nothing, with `home` as the home folder."""
    kept = ("PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LANG")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    return env | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("which", ["wheel", "sdist", "editable"])
def test_installs_and_runs_anywhere(dist, tree, tmp_path, which):
    python, site = new_environment(tmp_path / "env")
    what = ["--editable", tree] if which == "editable" else [dist[which]]
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", *what, cwd=tmp_path)

    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir(mode=0o700)
    surround(here, site)
    (here / "probe.py").write_text(textwrap.dedent(PROBE))
    compiles = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    # With a compiler, NumPy must not stand in for sources that were not found.
    env = clean_env(home) | ({"SRU_RT_CPU": "compiled"} if compiles else {})
    printed = run(python, "probe.py", cwd=here, env=env)
    assert printed.strip() == str((tree if which == "editable" else site) / "sru_rt")
    assert any(home.rglob("sru_rt/*")) == compiles

    # At the root of the checkout the folder cuda/ is beside NVIDIA's package, which must stay importable.
    cuda = "import sru_rt, cuda.pathfinder; print(cuda.pathfinder.NAME)"
    assert run(python, "-c", cuda, cwd=tree, env=clean_env(home)).strip() == "pathfinder"


def test_import_does_nothing(tmp_path):
    """Importing loads no framework and no library, starts no process, writes no file and prints nothing."""
    code = """
        import os
        import sys
        import ctypes  # looks at the running process when it is imported
        import numpy

        watched = ("subprocess.", "os.posix_spawn", "os.fork", "os.exec", "os.system", "os.mkdir", "ctypes.")
        before, seen = set(sys.modules), []

        def watch(event, args):
            if event.startswith(watched) or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                seen.append((event, args))

        sys.addaudithook(watch)
        import sru_rt
        assert not seen, seen
        frameworks = {"torch", "jax", "jaxlib", "cupy", "cupy_backends", "ml_dtypes", "tensorflow", "sru", "matplotlib"}
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert not loaded & frameworks, loaded & frameworks
        assert "sru_rt.bench" not in sys.modules
        open("written", "w").close()
        assert seen, "the watch does not see"
    """
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=home,
        env=clean_env(home),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in home.rglob("*")] == ["written"]
