"""The example programs, run as a user runs them: in a process of their own, in some folder."""

from __future__ import annotations

import operator
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrix import matrix

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHAR_LM = [sys.executable, str(EXAMPLES / "char_lm.py")]
CELLS = "sru qrnn mingru minlstm".split()
every_cell = pytest.mark.parametrize("cell", CELLS)
TINY = "--layers 2 --d 32 --embed 16".split()
SHORT = "--batch 8 --length 32".split()
FINAL = re.compile(r"^validation ([\d.]+) bits per character \(unigram ([\d.]+), gzip ([\d.]+)\)$", re.MULTILINE)
PROGRESS = r" *\d+%  step [\d,]+  [\d.]+ bits/char  [\d,]+ chars/s  \d+:\d\d left"
BEFORE = re.compile(r"^before training: validation on a part of the text, ([\d.]+) bits", re.MULTILINE)


def char_lm(folder: Path, *options: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAR_LM, *options], cwd=folder, capture_output=True, text=True, timeout=timeout)


def weights(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name.startswith("param.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an easily predictable text: five sentences in random order."""
    path = tmp_path_factory.mktemp("char_lm")
    words = "the quick brown fox jumps over a lazy dog while seven wizards make toxic brew".split()
    rng = random.Random(0)
    sentences = [" ".join(rng.sample(words, 6)) + ".\n" for _ in range(5)]
    (path / "text.txt").write_text("".join(rng.choices(sentences, k=900)))
    (path / "empty.txt").write_text("")
    (path / "short.txt").write_text("too short")
    (path / "subfolder").mkdir()
    np.savez(path / "other.npz", a=np.zeros(3))
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[float, float, str]:
    """Trains weights.npz; validation bits, unigram bits and everything printed."""
    result = char_lm(folder, "--text", "text.txt", "--out", "weights.npz", "--steps", "150", *TINY, *SHORT)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    final = FINAL.search(result.stdout)
    assert final, result.stdout
    return float(final[1]), float(final[2]), result.stdout


def test_quickstart_goes_down_its_gradient(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("on ")
    before, after = map(float, re.findall(r" (\d+\.\d+)", result.stdout))
    assert 0 < after < before


def test_own_cell_solves_the_adding_problem(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_cell.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "\n  c = f*c' + (1 - f)*uc*sigmoid(uc)\n" in result.stdout
    constant = re.search(r"the answer 1, always, has a mean squared error of ([\d.]+)", result.stdout)
    errors = [float(error) for error in re.findall(r"^step \d+: mean squared error ([\d.]+)$", result.stdout, re.M)]
    assert constant and len(errors) == 6
    assert errors[-1] < float(constant[1]) / 20
    numbers = [float(number) for number in re.findall(r"^token \d+ is marked: ([\d.]+)$", result.stdout, re.M)]
    answers = re.search(r"^answer by step ([\d.]+), by forward ([\d.]+), right ([\d.]+)$", result.stdout, re.M)
    assert answers and len(numbers) == 2
    by_step, by_forward, right = map(float, answers.groups())
    assert right == pytest.approx(sum(numbers), abs=0.0021)  # all are printed rounded
    assert by_step == pytest.approx(by_forward, abs=0.0021)
    assert by_step == pytest.approx(right, abs=0.25)


def test_training_beats_unigram(trained: tuple[float, float, str]) -> None:
    bits, unigram, output = trained
    before = BEFORE.search(output)
    assert before and float(before[1]) > unigram
    assert bits < unigram - 2  # the order of five sentences leaves well below one bit per character


@pytest.mark.parametrize("cell", matrix(CELLS[1:]))
def test_every_cell_trains_goes_on_and_writes(folder: Path, tmp_path: Path, cell: str) -> None:
    text = ["--text", str(folder / "text.txt")]
    result = char_lm(tmp_path, *text, "--cell", cell, "--out", "w.npz", "--steps", "150", *TINY, *SHORT)
    assert result.returncode == 0, result.stderr
    assert f"2 {cell} layers, d = 32" in result.stdout
    final = FINAL.search(result.stdout)
    assert final
    assert float(final[1]) < float(final[2]) - 2

    result = char_lm(tmp_path, *text, "--resume", "w.npz", "--steps", "5", "--lr", "0.001", *SHORT)
    assert result.returncode == 0, result.stderr
    before = BEFORE.search(result.stdout)
    assert before and float(before[1]) < float(final[1]) + 0.2
    result = char_lm(tmp_path, "--resume", "w.npz", "--sample", "200", "--prompt", "the quick ")
    words = result.stdout.replace(".", " ").split()
    assert sum(word in (folder / "text.txt").read_text() for word in words) > len(words) / 2


@pytest.mark.slow
@every_cell
def test_every_cell_learns_the_standard_library(tmp_path: Path, cell: str) -> None:
    result = char_lm(tmp_path, "--cell", cell, "--steps", "150", "--layers", "2", timeout=600)
    assert result.returncode == 0, result.stderr
    final = FINAL.search(result.stdout)
    assert final and float(final[1]) < float(final[2]) - 1


def test_progress_is_plain_lines_when_not_on_a_terminal(trained: tuple[float, float, str]) -> None:
    output = trained[2]
    lines = re.findall(rf"^{PROGRESS}$", output, re.MULTILINE)
    assert 10 < len(lines) < 30
    assert lines[-1].startswith("100%  step 150 ")
    assert "\r" not in output


def test_sample_follows_training(folder: Path, trained: tuple[float, float, str]) -> None:
    text = trained[2].split("sample:\n")[1]
    assert len(text) > 450
    words = set((folder / "text.txt").read_text().replace(".", " ").split())
    sampled = text.replace(".", " ").split()
    assert sum(word in words for word in sampled) > len(sampled) / 2


def test_same_seed_same_weights(folder: Path, tmp_path: Path) -> None:
    def run(name: str, seed: str) -> dict[str, np.ndarray]:
        options = ["--text", str(folder / "text.txt"), "--steps", "10", "--seed", seed, "--dropout", "0.2"]
        result = char_lm(tmp_path, *options, "--out", name, *TINY, *SHORT)
        assert result.returncode == 0, result.stderr
        return weights(tmp_path / name)

    first, again, other = run("a.npz", "5"), run("b.npz", "5"), run("c.npz", "6")
    assert len(first) == 3 + 3 * 2  # embedding, output weight and bias; weight, bias and v of two layers
    for name, array in first.items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(again[name], array, err_msg=name)
        assert not np.array_equal(other[name], array), name


def test_resume_goes_on(folder: Path, tmp_path: Path, trained: tuple[float, float, str]) -> None:
    options = ["--text", str(folder / "text.txt"), "--resume", str(folder / "weights.npz"), "--out", "more.npz"]
    result = char_lm(tmp_path, *options, "--steps", "60", "--lr", "0.003", *SHORT)
    assert result.returncode == 0, result.stderr
    before, final = BEFORE.search(result.stdout), FINAL.search(result.stdout)
    assert before and final
    assert float(before[1]) < trained[0] + 0.2
    assert float(final[1]) < trained[0] + 0.05
    assert "2 sru layers, d = 32" in result.stdout
    assert re.search(r"^device: (CPU \(|GPU 0, )", result.stdout, re.MULTILINE)
    old, new = weights(folder / "weights.npz"), weights(tmp_path / "more.npz")
    assert all(not np.array_equal(old[name], new[name]) for name in old)
    assert [path.name for path in tmp_path.iterdir()] == ["more.npz"]


def test_resume_writes_to_its_own_file_by_default(folder: Path, tmp_path: Path, trained: object) -> None:
    (tmp_path / "w.npz").write_bytes((folder / "weights.npz").read_bytes())
    result = char_lm(tmp_path, "--text", str(folder / "text.txt"), "--resume", "w.npz", "--steps", "1", *SHORT)
    assert result.returncode == 0, result.stderr
    assert not np.array_equal(
        weights(tmp_path / "w.npz")["param.embed"], weights(folder / "weights.npz")["param.embed"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


def test_sample_only(folder: Path, trained: object) -> None:
    before = (folder / "weights.npz").read_bytes()
    options = ["--resume", "weights.npz", "--sample", "60", "--prompt", "the quick", "--temperature", "0.5"]
    first, again = char_lm(folder, *options), char_lm(folder, *options)
    other = char_lm(folder, *options, "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the quick")
    assert len(first.stdout) == len("the quick") + 60 + len("\n")
    assert first.stdout == again.stdout != other.stdout
    assert (folder / "weights.npz").read_bytes() == before


def test_float64(folder: Path, tmp_path: Path) -> None:
    options = ["--text", str(folder / "text.txt"), "--dtype", "float64", "--steps", "5"]
    result = char_lm(tmp_path, *options, *TINY, *SHORT)
    assert result.returncode == 0, result.stderr
    assert {array.dtype for array in weights(tmp_path / "char_lm.npz").values()} == {np.dtype("float64")}


def test_default_text_is_the_standard_library(tmp_path: Path) -> None:
    result = char_lm(tmp_path, "--steps", "1", "--layers", "1", "--d", "8", "--embed", "8")
    assert result.returncode == 0, result.stderr
    sizes = re.search(r"^text: ([\d,]+) characters to learn from, ([\d,]+) after them", result.stdout)
    assert sizes
    learn, valid = (int(size.replace(",", "")) for size in sizes.groups())
    assert learn > 1_000_000
    assert abs(learn - 9 * valid) < 10


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT that can be sent to one process")
def test_interrupt_saves(folder: Path, tmp_path: Path) -> None:
    command = [*CHAR_LM, "--text", str(folder / "text.txt"), "--steps", "1000000", *TINY, *SHORT]
    # A test run in the background may have SIGINT ignored, which children inherit.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", heed, *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        seen = next((line for line in process.stdout if " step " in line), None)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert seen, stderr
    assert process.returncode == 130, stderr
    assert stderr == ""
    assert "weights saved in char_lm.npz" in stdout
    assert "stopped by Ctrl-C" in stdout
    assert [path.name for path in tmp_path.iterdir()] == ["char_lm.npz"]
    assert char_lm(tmp_path, "--sample", "20").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_progress_bar_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [*CHAR_LM, "--text", str(folder / "text.txt"), "--minutes", "0.02", *TINY, *SHORT]
    with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=subprocess.STDOUT) as process:
        os.close(theirs)
        output = b""
        try:
            while chunk := os.read(ours, 4096):
                output += chunk
        except OSError:  # how a Linux pseudo-terminal says that its other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0, output
    bars = re.findall(rf"\r\[[#-]{{10}}\] {PROGRESS}", output.decode())  # also: it fits into 80 columns
    assert len(bars) > 3
    assert bars[-1].startswith("\r[##########] 100%")


@pytest.mark.parametrize(
    "option, others",
    [
        ("--text missing.txt", ""),
        ("--text subfolder", ""),
        ("--text empty.txt", ""),
        ("--text short.txt", ""),
        ("--resume missing.npz", ""),
        ("--resume text.txt", ""),
        ("--resume other.npz", ""),
        ("--resume empty.txt", ""),
        ("--out missing/w.npz", "--text text.txt"),
        ("--out subfolder", "--text text.txt"),
        ("--sample 10", "--out untrained.npz"),
        ("--sample 0", ""),
        ("--steps 0", ""),
        ("--minutes 0", ""),
        ("--minutes nan", ""),
        ("--cell lstm", ""),
        ("--layers 0", ""),
        ("--d -1", ""),
        ("--embed 1.5", ""),
        ("--batch 0", ""),
        ("--batch 100000", "--text text.txt"),
        ("--length x", ""),
        ("--lr 0", ""),
        ("--lr inf", ""),
        ("--dropout 1", ""),
        ("--seed -1", ""),
        ("--dtype int8", ""),
        ("--device tpu", ""),
        ("--temperature 0", ""),
        ("--prompt=", ""),
        ("--d 33", "--resume weights.npz"),
        ("--cell qrnn", "--resume weights.npz"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(folder: Path, trained: object, option: str, others: str) -> None:
    before = sorted(folder.rglob("*"))
    result = char_lm(folder, *option.split(), *others.split())
    assert result.returncode == 2, result.stdout
    assert result.stdout == ""
    assert result.stderr.startswith("char_lm.py: argument ")
    assert result.stderr.count("\n") == 1
    assert option.replace("=", " ").split()[0] in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_out_of_memory_is_one_line(tmp_path: Path) -> None:
    result = char_lm(tmp_path, "--d", "1000000000000")  # beyond any address space
    assert result.returncode == 2, result.stdout
    assert result.stderr == "char_lm.py: not enough memory: lower --d, --layers, --batch or --length\n"


def test_help_names_every_option(tmp_path: Path) -> None:
    result = char_lm(tmp_path, "--help")
    assert result.returncode == 0, result.stderr
    options = (
        "text out resume steps minutes cell layers d embed dtype device batch length lr dropout seed sample prompt"
    )
    for option in [*options.split(), "temperature"]:
        assert re.search(rf"^  --{option} ", result.stdout, re.MULTILINE), option


def test_divergence_saves_nothing(folder: Path, tmp_path: Path) -> None:
    options = ["--text", str(folder / "text.txt"), "--steps", "40", "--lr", "1e36"]
    result = char_lm(tmp_path, *options, *TINY, *SHORT)
    assert result.returncode == 2, result.stdout
    assert result.stderr.splitlines()[-1].startswith("char_lm.py: argument --lr: ")
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@every_cell
def test_model_gradients_and_step(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """In float64: the gradient along a random direction against a central difference, and step against forward."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import char_lm as program

    rng = np.random.default_rng(0)
    model = program.Model({"cell": cell, "layers": 3, "d": 12, "embed": 7, "dtype": "float64"}, seed=1)
    tokens, targets = rng.integers(97, 110, (2, 9, 3)).astype(np.uint8)
    state = [rng.standard_normal(c.shape) for c in model.zero_state(3)]
    masks = program.dropout_masks(rng, model, 0.3, 3)

    def loss() -> float:
        return float(program.cross_entropy(model.forward(tokens, state, masks)[0], targets.reshape(-1))[0])

    logits, _, saved = model.forward(tokens, state, masks, save=True)
    grads = model.backward(program.cross_entropy(logits, targets.reshape(-1))[1], saved)
    assert grads.keys() == model.params.keys()
    for name, p in model.params.items():
        direction = rng.standard_normal(p.shape)
        slope, size = float((grads[name] * direction).sum()), 1e-6
        p += size * direction
        above = loss()
        p -= 2 * size * direction
        below = loss()
        p += size * direction
        assert slope == pytest.approx((above - below) / (2 * size), rel=1e-6, abs=1e-8), name

    whole, _, _ = model.forward(tokens[:, :1], model.zero_state(1))
    state = model.first_state()
    for t, token in enumerate(tokens[:, 0]):
        logits, state = model.step(int(token), state)
        np.testing.assert_allclose(logits, whole[t], rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module that chooses where an example runs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return __import__("_device")


def refuse(message: str) -> None:
    raise SystemExit(message)


def cupy_whose_gpu(works: Callable[[], bool]) -> types.ModuleType:
    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(is_available=works)  # type: ignore[attr-defined]
    return module


def no_driver() -> bool:
    raise RuntimeError("libcuda.so.1:\n not found")


@pytest.mark.parametrize(
    "cupy, reason",
    [
        (None, "CuPy is not installed"),  # None is how sys.modules says so
        (cupy_whose_gpu(lambda: False), "CuPy finds no GPU"),
        (cupy_whose_gpu(no_driver), "CuPy does not work here: libcuda.so.1: not found"),
    ],
)
def test_without_a_gpu_auto_takes_the_cpu_and_gpu_says_why_not(
    device: types.ModuleType, monkeypatch: pytest.MonkeyPatch, cupy: types.ModuleType | None, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    assert device.choose("cpu", refuse) == (np, "CPU")
    assert device.choose("auto", refuse) == (np, f"CPU ({reason})")
    with pytest.raises(SystemExit, match=re.escape(f"argument --device: there is no GPU to use ({reason});")):
        device.choose("gpu", refuse)


@pytest.fixture
def gpu(device: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for CuPy, with what the examples use of CuPy beyond what the library does."""
    pytest.importorskip("ml_dtypes")
    from emu import fake_cupy

    def host(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("an array of NumPy among those of CuPy")
        return value._host if isinstance(value, fake_cupy.ndarray) else value

    def lifted(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*map(host, args), **kwargs)
            return args[0] if result is host(args[0]) else cupy.asarray(result)

        return call

    def swapped(function: Callable) -> Callable:
        return lambda a, b: function(b, a)

    with fake_cupy.installed(monkeypatch) as cupy:
        for name in ("eye", "exp", "log", "minimum", "sqrt", "zeros_like"):
            monkeypatch.setattr(cupy, name, lifted(getattr(np, name)), raising=False)
        for name in ("matmul", "truediv", "sub", "isub", "itruediv"):
            monkeypatch.setattr(cupy.ndarray, f"__{name}__", lifted(getattr(operator, name)), raising=False)
        for name in ("add", "mul", "truediv"):
            swap = lifted(swapped(getattr(operator, name)))
            monkeypatch.setattr(cupy.ndarray, f"__r{name}__", swap, raising=False)
        for name in ("max", "mean", "sum"):
            monkeypatch.setattr(cupy.ndarray, name, lifted(getattr(np, name)), raising=False)
        monkeypatch.setattr(cupy.cuda, "is_available", lambda: True, raising=False)
        yield types.SimpleNamespace(cupy=cupy, record=fake_cupy.record)


def test_quickstart_on_a_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--device", "gpu"])
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    printed = capsys.readouterr().out
    assert printed.startswith("on GPU 0, stand-in, with CuPy ")
    before, after = map(float, re.findall(r"(\d+\.\d{3})", printed))
    assert 0 < after < before
    assert gpu.record.reads == ["__float__"] * 2  # of the two losses that are printed
    assert [kernel for kernel, *_ in gpu.record.launches] == ["forward", "backward", "sum_partials", "forward"]


def test_own_cell_on_a_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import own_cell as program

    monkeypatch.setattr(program, "xp", np)  # main sets it
    monkeypatch.setattr(program, "L", 6)
    monkeypatch.setattr(program, "B", 3)
    monkeypatch.setattr(program, "d", 5)
    printed = []
    for where in ("gpu", "cpu"):
        monkeypatch.setattr(sys, "argv", ["own_cell.py", "--device", where, "--steps", "2"])
        program.main()
        printed.append(capsys.readouterr().out.partition("step 1")[2])
    assert printed[0] == printed[1] and "answer by step" in printed[0]


@every_cell
def test_training_on_a_gpu_is_that_on_the_cpu_and_never_waits(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    import char_lm as program

    hyper = {"cell": cell, "layers": 2, "d": 12, "embed": 7, "dtype": "float32"}
    text = np.random.default_rng(0).integers(97, 110, 60).astype(np.uint8).tobytes()

    def three_steps(xp: Any) -> dict[str, np.ndarray]:
        monkeypatch.setattr(program, "xp", xp)
        model = program.Model(hyper, seed=1)
        adam, data, state = program.Adam(model.params), program.streams(text, 3), model.zero_state(3)
        gpu.record.clear()
        rng = np.random.default_rng(0)
        for start in (0, 5, 10):
            masks = program.dropout_masks(rng, model, 0.3, 3)
            tokens, targets = data[start : start + 5], data[start + 1 : start + 6]
            logits, state, saved = model.forward(tokens, state, masks, save=True)
            _, dlogits = program.cross_entropy(logits, targets.reshape(-1))
            adam.update(model.backward(dlogits, saved), 0.01)
        assert gpu.record.reads == []
        return {name: program.to_host(p) for name, p in model.params.items()}

    on_cpu, on_gpu = three_steps(np), three_steps(gpu.cupy)
    assert len(gpu.record.launches) == 3 * 2 * 3
    for name, array in on_cpu.items():
        assert type(on_gpu[name]) is np.ndarray
        np.testing.assert_allclose(on_gpu[name], array, rtol=2e-3, atol=2e-5, err_msg=name)  # Adam divides by the root
