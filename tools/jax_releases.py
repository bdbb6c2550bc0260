"""Tries the binding for JAX beside releases of JAX, each in an environment of its own.

    python tools/jax_releases.py FOLDER 0.5.0 0.7.2 ...

The environments are made in FOLDER, and used again where they are there. The tests are those of what differs between
releases: versions of XLA's foreign function interface, transformations, many devices, exported programs.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    ("test_jax_ffi.py", "handler or plans_are or errors or versions or backend"),
    ("test_jax_functions.py", "functions_of_the_core or without_64 or numbers or own_cell or lengths"),
    ("test_jax_transforms.py", "vmap_is_a_loop or remat or donated or minlstm or threads or recomputation or by_this"),
    ("test_jax_sharding.py", "2"),
    ("test_jax_over_time.py", "mistakes or (one_device and 2)"),
    ("test_jax_export.py", ""),
)


def main(folder: Path, releases: list[str]) -> int:
    failed = []
    for release in releases:
        python = environment(folder, release)
        for name, chosen in TESTS:
            command = [
                python,
                "-m",
                "pytest",
                "-q",
                "-n0",
                str(ROOT / "tests" / name),
                *(["-k", chosen] if chosen else []),
            ]
            sys.stderr.write(f"JAX {release}: {name}\n")
            if subprocess.run(command, cwd=folder).returncode:
                failed.append(f"{release} {name}")
    sys.stderr.write(f"failed: {', '.join(failed)}\n" if failed else "all passed\n")
    return len(failed)


def environment(folder: Path, release: str) -> str:
    """The Python of an environment with a release of JAX, and the project as users install it."""
    place = folder / f"jax-{release}"
    python = str(place / "bin" / "python")
    if not place.is_dir():
        venv.create(place, with_pip=True)
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run(
        [*install, f"jax=={release}", f"jaxlib=={release}", "flatbuffers", "absl-py", f"{ROOT}[pytest]"], check=True
    )
    subprocess.run([*install, "--no-deps", "--force-reinstall", str(ROOT)], check=True)
    return python


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
