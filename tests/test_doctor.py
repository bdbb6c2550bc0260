"""`python -m sru_rt doctor`: its probes, its advice, and the whole of it as a user sees it."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import oracle
from emu import emulator
from sru_rt import advice, compile_cpu, compile_gpu, doctor, probes, selfcheck
from sru_rt.errors import CompileError

GPU = {"device": "cuda:0", "name": "H200", "architecture": "sm_90", "multiprocessors": 132, "gib": 139.8}

# Everything there, and everything matching.
HEALTHY = {
    "packages": {"numpy": "2.0", "cupy-cuda12x": "14.2.0", "nvidia-cuda-nvrtc-cu12": "12.9.86", "torch": None},
    "machine": {"system": "Linux", "nvidia_device": True},
    "compiler": {"command": "c++", "version": "c++ 12"},
    "driver": {"cuda": "12.9"},
    "gpus": [GPU],
    "cupy": {"version": "14.2.0", "built_for_cuda": "12.9"},
    "nvrtc": {"version": "12.9", "oldest_architecture": "sm_50", "newest_architecture": "sm_121", "file": None},
    "targets": {"sm_90": "sm_90"},
    "cublas": {"file": None},
    "cache": {"folder": "/home/me/.cache/sru_rt", "cpu_kernels": 1},
    "settings": {"SRU_RT_CPU": "auto", "SRU_RT_PLAN": None},
}
NO_GPU = {"error": "no NVIDIA driver (libcuda.so.1: not found)"}


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "sru_rt", "doctor", *arguments]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Advice


@pytest.mark.parametrize(
    "found, command",
    [
        ({}, None),
        # On a machine without a GPU nothing of a GPU is missed.
        ({"gpus": NO_GPU, "driver": NO_GPU, "machine": {"nvidia_device": False}}, None),
        (
            {
                "gpus": NO_GPU,
                "driver": NO_GPU,
                "machine": {"nvidia_device": None},
                "packages": {"cupy-cuda12x": None},
                "cupy": {"error": "not installed"},
                "nvrtc": {"error": "CuPy cannot be imported"},
                "cublas": {"error": "no module named cupy"},
                "targets": {},
            },
            None,
        ),
        ({"gpus": NO_GPU, "driver": NO_GPU}, "sudo ubuntu-drivers install"),
        ({"driver": {"cuda": "11.8"}}, "sudo ubuntu-drivers install"),
        (
            {"packages": {}, "cupy": {"error": "not installed"}, "nvrtc": {"error": "x"}, "cublas": {"error": "x"}},
            "pip install 'sru_rt[cuda12]'",
        ),
        (
            {"packages": {}, "cupy": {"error": "not installed"}, "driver": {"cuda": "13.1"}},
            "pip install 'sru_rt[cuda13]'",
        ),
        (
            {
                "cupy": {"error": "installed, but cannot be imported: libcudart"},
                "gpus": NO_GPU,
                "machine": {"nvidia_device": False},
            },
            "pip install 'sru_rt[cuda12]'",
        ),
        ({"nvrtc": {"error": "NVRTC was not found"}}, "pip install 'sru_rt[cuda12]'"),
        ({"cublas": {"error": "CuPy does not find it"}}, "pip install 'sru_rt[cuda12]'"),
        (
            {"packages": {"cupy-cuda13x": "14.2.0"}, "cupy": {"version": "14.2.0", "built_for_cuda": "13.0"}},
            "pip uninstall -y cupy-cuda13x && pip install 'sru_rt[cuda12]'",
        ),
        (  # A newer driver serves older releases.
            {"driver": {"cuda": "13.0"}},
            None,
        ),
        (
            {"packages": {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}},
            "pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install 'sru_rt[cuda12]'",
        ),
        (
            {"packages": {"nvidia-cuda-nvrtc": "13.0"}, "nvrtc": {**HEALTHY["nvrtc"], "version": "13.0"}},
            "pip uninstall -y nvidia-cuda-nvrtc && pip install 'sru_rt[cuda12]'",
        ),
        (
            {"packages": {"nvidia-cuda-nvrtc-cu12": "12.9", "nvidia-cuda-nvrtc": "13.0", "cupy-cuda12x": "14.2"}},
            "pip uninstall -y nvidia-cuda-nvrtc && pip install 'sru_rt[cuda12]'",
        ),
        (
            {
                "packages": {"nvidia-cuda-nvrtc-cu12": "12.9", "nvidia-cuda-nvrtc": "13.0", "cupy-cuda12x": "14.2"},
                "driver": {"cuda": "13.0"},
            },
            "pip uninstall -y nvidia-cuda-nvrtc-cu12 cupy-cuda12x && pip install 'sru_rt[cuda13]'",
        ),
        (
            {"targets": {"sm_130": "NVRTC 12.9 does not know sm_130, only sm_90; install another"}},
            "pip install --upgrade --upgrade-strategy eager 'sru_rt[cuda12]'",
        ),
        (
            {
                "targets": {"sm_70": "NVRTC 13.0 does not know sm_70, only sm_75; install another"},
                "nvrtc": {**HEALTHY["nvrtc"], "version": "13.0", "oldest_architecture": "sm_75"},
                "packages": {"nvidia-cuda-nvrtc": "13.0", "cupy-cuda13x": "14.2"},
                "cupy": {"version": "14.2.0", "built_for_cuda": "13.0"},
                "driver": {"cuda": "13.0"},
            },
            "pip uninstall -y cupy-cuda13x nvidia-cuda-nvrtc && pip install 'sru_rt[cuda12]'",
        ),
        ({"cache": {"error": "others can write to /tmp/c; run `chmod go-w /tmp/c` or set"}}, "chmod go-w /tmp/c"),
        ({"cache": {"error": "the cache folder /c cannot be written"}}, 'export SRU_RT_CACHE_DIR="$(mktemp -d)"'),
        ({"settings": {"SRU_RT_CPU": {"error": "SRU_RT_CPU must be one of"}}}, "unset SRU_RT_CPU"),
        (
            {"settings": {"SRU_RT_NUM_THREADS": {"error": "OMP_NUM_THREADS must be a positive number"}}},
            "unset OMP_NUM_THREADS",
        ),
        (
            {"compiler": {"error": "'icpc' was not found"}, "settings": {"SRU_RT_CXX": "icpc"}},
            "unset SRU_RT_CXX CXX",
        ),
    ],
)
def test_what_mends_it(found, command, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    given = advice.advice({**copy.deepcopy(HEALTHY), **found})
    if command is None:
        assert given == []
    else:
        assert [item["command"][: len(command)] for item in given] == [command], given
        assert given[0]["problem"]


@pytest.mark.parametrize("tool, command", [("apt-get", "sudo apt-get install g++"), ("", "conda install gxx")])
@pytest.mark.skipif(sys.platform == "win32", reason="there is no compiler for Windows")
def test_how_to_install_a_compiler(tool, command, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == tool else None)
    for user, given in ((1000, command), (0, command.removeprefix("sudo "))):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user, raising=False)
        (item,) = advice.advice({**HEALTHY, "compiler": {"error": "no C++ compiler was found on the PATH"}})
        assert item["command"] == given


# ----------------------------------------------------------------------------------------------------------------------
# Probes


class Driver:
    """A stand-in for NVIDIA's libcuda, with two GPUs."""

    def __init__(self, failing: str = "", code: int = 100, gpus: int = 2) -> None:
        self.failing, self.code, self.gpus = failing, code, gpus

    def __getattr__(self, function):
        def call(*arguments):
            if function == self.failing:
                return self.code
            getattr(self, f"_{function}")(*[getattr(a, "_obj", a) for a in arguments])
            return 0

        return call

    def _cuInit(self, flags):
        assert flags == 0

    def _cuDriverGetVersion(self, version):
        version.value = 12080

    def _cuDeviceGetCount(self, count):
        count.value = self.gpus

    def _cuDeviceGet(self, device, number):
        device.value = number + 7

    def _cuDeviceGetName(self, name, size, device):
        name.value = b"NVIDIA H200"
        assert size == len(name)

    def _cuDeviceTotalMem_v2(self, total, device):
        total.value = 140 << 30

    def _cuDeviceGetAttribute(self, value, which, device):
        value.value = {75: 9, 76: 0, 16: 132 if device.value == 7 else 114}[which]

    def _cuGetErrorString(self, code, text):
        text.value = b"no CUDA-capable device is detected"


def test_gpus(monkeypatch):
    monkeypatch.setattr(probes, "_libcuda", Driver)
    assert probes.driver() == {"cuda": "12.8"}
    first, second = probes.gpus()
    wanted = {"device": "cuda:0", "name": "NVIDIA H200", "architecture": "sm_90", "multiprocessors": 132, "gib": 140.0}
    assert first == wanted
    assert second == {**wanted, "device": "cuda:1", "multiprocessors": 114}


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(probes, "_libcuda", lambda: Driver("cuInit"))
    reason = "cuInit of the NVIDIA driver: no CUDA-capable device is detected (100)"
    assert probes.guarded(probes.gpus) == {"error": reason}
    monkeypatch.setattr(probes, "_libcuda", lambda: Driver(gpus=0))
    assert probes.guarded(probes.gpus) == {"error": "the driver shows none"}

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert probes.guarded(probes.gpus)["error"].startswith("no NVIDIA driver (")


def test_plans_are_those_of_the_gpus():
    gpus = [GPU, {**GPU, "device": "cuda:1"}, {**GPU, "multiprocessors": 2}]
    rows = probes.plans(gpus)
    assert [r["multiprocessors"] for r in rows] == [132] * (len(rows) // 2) + [2] * (len(rows) // 2)
    assert rows[0]["forward"] != rows[len(rows) // 2]["forward"]
    assert {r["architecture"] for r in probes.plans([])} == {"sm_90"}
    assert [("in parallel" in r["forward"], "in parallel" in r["backward"]) for r in rows[:2]] == [
        (True, True),
        (False, False),
    ]


def test_targets_of_architectures(monkeypatch):
    def target(arch):
        if arch == 130:
            raise CompileError("sru_rt: NVRTC 12.9 does not know sm_130\nmore")
        return arch - arch % 10

    monkeypatch.setattr(compile_gpu, "target", target)
    gpus = [{**GPU, "architecture": f"sm_{arch}"} for arch in (90, 89, 89, 130)]
    wanted = {"sm_90": "sm_90", "sm_89": "sm_80", "sm_130": "NVRTC 12.9 does not know sm_130"}
    assert probes.targets(gpus) == wanted


def test_cupy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)  # which another test may have imported
    monkeypatch.setattr(probes, "_version", lambda package: None)
    assert probes.guarded(probes.cupy) == {"error": "not installed"}
    assert "pip install 'sru_rt[cuda12]'" in probes.guarded(probes.nvrtc)["error"]
    assert "error" in probes.guarded(probes.cublas)
    monkeypatch.setattr(probes, "_version", lambda package: "14.0" if package == "cupy-cuda12x" else None)
    assert probes.guarded(probes.cupy)["error"].startswith("installed, but cannot be imported: ")
    assert probes.packages()["cupy-cuda12x"] == "14.0" and "cupy" not in probes.packages()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("SRU_RT_CACHE_DIR", str(tmp_path))
    (tmp_path / "a.so").write_bytes(b"12345")
    (tmp_path / "b.cubin").write_bytes(b"123")
    wanted = {"cpu_kernels": 1, "cpu_bytes": 5, "gpu_kernels": 1, "gpu_bytes": 3, "folder": str(tmp_path)}
    assert probes.cache() == wanted
    tmp_path.chmod(0o777)
    assert probes.cache() == {**wanted, "error": probes.cache()["error"]}
    assert f"chmod go-w {tmp_path}" in probes.cache()["error"]


def test_settings_that_are_not_understood(monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "gpu")
    monkeypatch.setenv("SRU_RT_PLAN", "depth=8")
    found = probes.settings()
    assert found["SRU_RT_CPU"]["error"].startswith("SRU_RT_CPU must be one of")
    assert (found["SRU_RT_PLAN"], found["SRU_RT_TF32"]) == ("depth=8", False)
    assert "error: SRU_RT_CPU must be" in doctor.render("settings", found)


def test_every_setting_is_shown():
    from sru_rt import settings

    documented = {word for f in vars(settings).values() for word in (getattr(f, "__doc__", "") or "").split()}
    assert {word.rstrip(":,") for word in documented if word.startswith("SRU_RT_")} == set(probes.settings())


# ----------------------------------------------------------------------------------------------------------------------
# The recurrence that is tried


def test_the_recurrence_is_right(backend):
    """What is expected is what the oracle computes."""
    values, given = selfcheck.compute("cpu"), selfcheck.inputs()
    h, c_last = oracle.sru_forward(**given)
    wanted = {"h": h, "c_last": c_last}
    gradients = oracle.sru_backward(**given, dh=h, dc_last=c_last)
    wanted |= {f"d{name}": gradients[name] for name in ("x", "weight", "bias", "v", "c0")}
    assert set(wanted) == set(values) == set(selfcheck.EXPECTED)
    for name, array in wanted.items():
        assert np.abs(array).sum() == pytest.approx(selfcheck.EXPECTED[name], rel=1e-5)
    found = {"values": values, "seconds": 0.1}
    assert selfcheck.verdict(found, found) == {"computes": True, "seconds": 0.1}


@pytest.mark.parametrize("name", selfcheck.EXPECTED)
@pytest.mark.parametrize("fault", [np.nan, 1e-3])
def test_wrong_results_are_seen(name, fault, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    right = {"values": selfcheck.compute("cpu"), "seconds": 0}
    wrong = copy.deepcopy(right)
    values = wrong["values"][name]
    largest = int(np.argmax(np.abs(values)))
    values[largest] += fault  # leaves the sum as it is, but for NaN
    values[(largest + 1) % len(values)] -= (
        np.sign(values[(largest + 1) % len(values)]) * fault * np.sign(values[largest])
    )
    found = selfcheck.verdict(wrong, right)
    assert not found["computes"] and name in found["error"]
    found = selfcheck.verdict(right, wrong)  # a wrong reference is not to blame others
    assert found["computes"] or np.isfinite(fault)


def test_failures_of_a_process(monkeypatch):
    failed = {"error": "no compiler"}
    assert selfcheck.verdict(failed, failed) == {"computes": False, "error": "no compiler"}

    def started(code):
        run = subprocess.run
        monkeypatch.setattr(subprocess, "run", lambda _, **k: run([sys.executable, "-c", code], **k))
        found = selfcheck.on("cpu", "numpy")
        monkeypatch.undo()
        return found

    killed = started("import os; os.kill(os.getpid(), 9)") if os.name == "posix" else None
    assert killed in (None, {"error": "the process ended with status -9: it wrote nothing"})
    raised = started("raise ImportError('no module')")
    assert raised == {"error": "the process ended with status 1: ImportError: no module"}
    monkeypatch.setattr(selfcheck, "_SECONDS", 0.2)
    run = subprocess.run
    slow = [sys.executable, "-c", "import time; time.sleep(9)"]
    monkeypatch.setattr(subprocess, "run", lambda _, **k: run(slow, **k))
    assert selfcheck.on("cpu", "numpy") == {"error": "no result after 0.2 s"}


def test_a_process_says_what_failed(monkeypatch):
    monkeypatch.setenv("SRU_RT_CXX", "no-such-compiler")
    error = selfcheck.on("cpu", "compiled")["error"]
    assert error.startswith("the C++ compiler 'no-such-compiler'") and "\n" not in error


@pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "it runs here")
def test_the_recurrence_on_a_gpu(monkeypatch, tmp_path):
    """The way of its arrays there and back, with stand-ins for CuPy and the GPU."""
    fake_cupy = pytest.importorskip("emu.fake_cupy")
    monkeypatch.setenv("SRU_RT_CACHE_DIR", str(tmp_path / "cache"))
    with fake_cupy.installed(monkeypatch):
        found = {"values": selfcheck.compute("cuda:1"), "seconds": 1}
        assert {device for _, device, _ in fake_cupy.record.launches} == {1}
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    reference = {"values": selfcheck.compute("cpu"), "seconds": 1}
    assert selfcheck.verdict(found, reference)["computes"]


# ----------------------------------------------------------------------------------------------------------------------
# The whole


@pytest.fixture
def healthy(monkeypatch):
    """All probes find what HEALTHY says, and backends compute."""
    for name in doctor._PROBES:
        if name not in ("backends", "plans"):
            monkeypatch.setattr(probes, name, lambda *_, name=name: copy.deepcopy(HEALTHY[name]))
    values = selfcheck.compute("cpu")
    asked = []

    def on(*backend):
        asked.append(backend)
        return {"values": values, "seconds": 0.5}

    monkeypatch.setattr(selfcheck, "on", on)
    return asked


def test_every_backend_is_tried(healthy, capsys):
    assert doctor.run() == 0
    out = capsys.readouterr().out
    assert healthy == [("cpu", "numpy"), ("cpu", "compiled"), ("cuda:0", "auto")]
    assert out.endswith("nothing to mend\n")
    assert "cuda:0                yes       0.5" in out
    assert "GPUs\n  device  name  architecture  multiprocessors  GiB\n  cuda:0  H200  sm_90         132" in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_without_cupy_a_gpu_does_not_compute(healthy, monkeypatch, capsys):
    monkeypatch.setattr(probes, "cupy", lambda: 1 / 0)
    assert doctor.run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cupy"] == {"error": "ZeroDivisionError: division by zero"}
    last = report["backends"][-1]
    assert (last["backend"], last["computes"]) == ("cuda:0", False) and "CuPy" in last["error"]
    assert [item["command"] for item in report["advice"]] == ["pip install 'sru_rt[cuda12]'"]


def test_without_nvrtc_there_is_advice_all_the_same(healthy, monkeypatch, capsys):
    """What the real probe of targets says then is no target."""
    missing = "kernels for a GPU are compiled through CuPy, which cannot be imported"
    monkeypatch.setattr(probes, "nvrtc", lambda: 1 / 0)
    monkeypatch.setattr(probes, "targets", lambda gpus: {"sm_90": missing})
    doctor.run(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert [item["command"] for item in report["advice"]] == ["pip install 'sru_rt[cuda12]'"]


def test_exit_status_if_nothing_computes(healthy, monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "on", lambda *_: {"error": "killed"})
    assert doctor.run() == 1
    assert capsys.readouterr().out.count("killed") == 3


@pytest.mark.parametrize("name", [*doctor._PROBES, "advice"])
def test_no_failure_of_a_probe_is_fatal(name, healthy, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("something")

    where = advice if name == "advice" else probes
    monkeypatch.setattr(where, name, fail)
    doctor.run()
    said = capsys.readouterr()
    assert "KeyError: 'something'" in said.out and not said.err
    assert ("nothing to mend" in said.out or "what to do" in said.out) and "backends" in said.out


def test_as_a_user(tmp_path):
    status, out, err = run(env={"SRU_RT_CACHE_DIR": str(tmp_path / "cache")})
    assert (status, err) == (0, "")
    assert "  sru_rt  " in out and f"folder       {tmp_path / 'cache'}" in out
    if "no GPU: " in out:
        assert "no GPU: no NVIDIA driver (" in out or "no GPU: cuInit of the NVIDIA driver" in out
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert titles[0] == "packages" and titles[-1] in ("what to do", "nothing to mend")
    assert "Traceback" not in out


def test_as_a_user_without_a_compiler(tmp_path):
    """NumPy computes; the report says what is missing."""
    env = {"PATH": "", "SRU_RT_CACHE_DIR": str(tmp_path / "cache"), "SRU_RT_CPU": "", "SRU_RT_CXX": "", "CXX": ""}
    status, out, err = run("--json", env=env)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert "no C++ compiler" in report["compiler"]["error"]
    assert {row["backend"]: row["computes"] for row in report["backends"][:2]} == {
        "NumPy": True,
        "compiled for the CPU": False,
    }
    assert any("no C++ compiler" in item["problem"] for item in report["advice"])
    assert not {"torch", "jax"} & set(report) and report["packages"]["numpy"] == np.__version__


def test_settings_full_of_mistakes(tmp_path):
    names = ("SRU_RT_CPU", "SRU_RT_CXX", "SRU_RT_NUM_THREADS", "SRU_RT_POOL_MB", "SRU_RT_PLAN", "SRU_RT_CACHE_DIR")
    status, out, err = run(env={**dict.fromkeys(names, "'x"), "SRU_RT_CACHE_DIR": "/dev/null/x"})
    assert err == "" and "Traceback" not in out
    for name in ("SRU_RT_CPU", "SRU_RT_NUM_THREADS", "SRU_RT_POOL_MB", "SRU_RT_PLAN"):
        assert f"      unset {name}\n" in out
    assert "SRU_RT_CACHE_DIR=" in out
    assert status == 0  # NumPy needs none of them


def test_frameworks_are_not_imported(healthy):
    program = "import sys\nfrom sru_rt import doctor\ndoctor.examine()\nprint(*{'torch', 'jax'} & set(sys.modules))"
    env = {**os.environ, "SRU_RT_CPU": "numpy"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "\n"


def test_a_compiler_is_described():
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    found = probes.compiler()
    assert found["command"] == compile_cpu.compiler().command[0] and "\n" not in found["version"]
