"""`python -m sru_rt`, and that `warm` compiles what calls look for: no more, no less."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import sru_rt
from emu import emulator
from sru_rt import __main__ as command_line
from sru_rt import abi, cache, choose, chunks, compile_gpu, launch, launch_gpu, plan, warm
from sru_rt.calls import MANY, Call
from sru_rt.cells import named_cells
from sru_rt.dtypes import to_numpy
from sru_rt.errors import CompileError
from sru_rt.machine import Device

CELLS = {cell.name: cell for cell in named_cells()}
DEVICE = Device(90, 132)

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """What a user sees: exit status, standard output, standard error."""
    command = [sys.executable, "-m", "sru_rt", *arguments]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("SRU_RT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def new_process(monkeypatch):
    """Forgets, when called, which batch sizes the planner has seen, as a new process does."""

    def forget() -> None:
        monkeypatch.setattr(plan, "_batches", {})

    forget()
    return forget


@pytest.fixture
def nvrtc(monkeypatch):
    """An NVRTC that knows sm_80 and sm_90, and whose code is the text; returns the texts that it was given."""
    texts: list[str] = []

    def compile(text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        texts.append(text)
        return text.encode(), ""

    def target(arch: int) -> int:
        if arch not in (80, 90):
            raise CompileError(f"sru_rt: NVRTC 12.9 does not know sm_{arch}, only sm_80, sm_90")
        return arch

    monkeypatch.setattr(compile_gpu, "compile", compile)
    monkeypatch.setattr(compile_gpu, "target", target)
    monkeypatch.setattr(compile_gpu, "version", lambda: "12.9")
    return texts


def options(*arguments: str):
    return command_line._parser().parse_args(["warm", *arguments])


def warmed(*arguments: str) -> set[tuple]:
    """What `warm` would compile."""
    return {(k.variant, k.plan, k.arch) for k in warm.kernels(options(*arguments))}


def looked_for(monkeypatch, calls, device: Device = DEVICE, wide_params: bool = False) -> set[tuple]:
    """What the calls of the function `calls` would need on a GPU, as they are made on the CPU.

    There parameters of 16 bits are converted, on a GPU they are not (see test_gpu_kernels.py).
    """
    seen, really = set(), launch.run

    def spy(variant, arguments, *rest):
        narrow = variant.cell.bits("params", lambda a: variant.dtype in ("float16", "bfloat16") and not wide_params)
        on_gpu = replace(variant, narrow=narrow)
        seen.add((on_gpu, plan.plan(on_gpu, arguments, device), device.arch))
        return really(variant, arguments, *rest)

    def chunk(variant, sizes, forward, time_parallel, _):
        return chunks.length(variant, sizes, forward, time_parallel, device)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", spy)
        patch.setattr(launch, "chunk", chunk)
        patch.setenv("SRU_RT_CPU", "numpy")
        calls()
    return seen


def layer(cell: str, dtype: str, L: int, B: int, d: int, D: int = 1, need=None, **given):
    """Calls the functions with what makes them use the cell."""
    rng = np.random.default_rng(0)
    kind = to_numpy(dtype)

    def array(*shape):
        return rng.standard_normal(shape).astype(kind)

    k, family = len(CELLS[cell].gates), cell.partition("_")[0]
    if family != "sru":
        _layer_of_others(family, cell, array, (L, B, D, d), need, given)
        return
    gated = 1 if cell == "sru_basic_no_v" else 2
    arguments = {"x": array(L, B, D * d), "weight": array(D, k, d, D * d), "bias": array(D, gated, d)}
    arguments["v"] = None if cell.endswith("no_v") else array(D, gated, d)
    arguments |= {"sru_no_skip": {"highway": False}, "sru_tanh": {"activation": "tanh"}}.get(cell, {})
    arguments |= {"sru_on_current": {"reset_on": "current"}, "sru_basic_no_v": {"reset_gate": False}}.get(cell, {})
    if cell == "sru_v_per_step_dropout":
        arguments |= {"v": array(L, B, D, 2, d), "dropout_mask": array(B, D, d)}
    h, _, *saved = sru_rt.sru_forward(**arguments, **given)
    if saved:
        sru_rt.sru_backward(*saved, h, need=need)


def _layer_of_others(family, cell, array, sizes, need, given):
    L, B, D, d = sizes
    k = len(CELLS[cell].gates)
    arguments = {"x": array(L, B, D * d), "weight": array(D, k, d, D * d)}
    arguments["bias"] = array(D, k - (cell == "qrnn_projected"), d)
    arguments |= {"qrnn_f": {"pooling": "f"}, "qrnn_ifo": {"pooling": "ifo"}}.get(cell, {})
    arguments |= {"highway": True} if cell in ("qrnn_highway", "qrnn_projected") else {}
    arguments |= {"zoneout_mask": array(L, B, D, d)} if cell == "qrnn_zoneout" else {}
    arguments |= {"candidate": "positive"} if cell.endswith("positive") else {}
    h, _, *saved = getattr(sru_rt, f"{family}_forward")(**arguments, **given)
    if saved:
        getattr(sru_rt, f"{family}_backward")(*saved, h, need=need)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_without_a_command_help_is_written():
    status, out, err = run()
    assert (status, err) == (2, "")
    assert all(command in out for command in ("doctor", "warm", "bench"))


def test_version():
    assert run("--version") == (0, f"sru_rt {sru_rt.__version__}\n", "")


def test_unknown_commands_are_refused():
    status, out, err = run("measure")
    assert (status, out) == (2, "") and "invalid choice: 'measure'" in err


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
def test_a_reader_may_leave():
    program = f"{sys.executable} -m sru_rt warm --list | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(2):
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
        assert done.stderr == "" and done.returncode in (0, 1)


def test_nothing_heavy_is_imported():
    program = (
        "import sys\nfrom sru_rt.__main__ import main\ntry:\n    main(['warm', '--list'])\nfinally:\n"
        "    print(*sorted({'cupy', 'torch', 'jax', 'ml_dtypes', 'matplotlib', 'sru_rt.bench'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(CELLS)


# ----------------------------------------------------------------------------------------------------------------------
# warm: which kernels


@pytest.mark.parametrize("cell", CELLS)
def test_calls_look_for_what_is_warmed(cell, monkeypatch, nvrtc, new_process):
    """Each kernel of each way to call, and none that is not looked for."""
    sizes = [*zip(("float32", "float16"), (4, 66), (1, 2), (33, 64))]
    for (dtype, B, D, d), save in itertools.product(sizes, (False, True, 3)):
        wanted = looked_for(monkeypatch, functools.partial(layer, cell, dtype, 5, B, d, D, save=save))
        shape = ("--d", str(d), "--directions", str(D), "--batch", str(B), "--dtype", dtype)
        name = {False: "no", True: "every", 3: "3"}[save]
        assert wanted == warmed("--arch", "sm_90", "--cell", cell, *shape, "--save", name, "--length", "5")


@pytest.mark.parametrize("width, multiprocessors", [(1, 132), (2, 1)])
def test_pairs_of_channels(width, multiprocessors, monkeypatch, nvrtc, new_process):
    device = Device(90, multiprocessors)
    wanted = looked_for(monkeypatch, lambda: layer("sru", "float16", 3, 8, 64, save=True), device)
    assert {p.width for _, p, _ in wanted} == {width}
    arguments = "--arch sm_90 --cell sru --dtype float16 --d 64 --batch 8 --save every --length 3 --multiprocessors"
    assert wanted == warmed(*arguments.split(), str(multiprocessors))


@pytest.mark.parametrize(
    "arguments, given",
    [
        ("--mask --save every", {"mask": np.zeros((6, 2), bool), "save": True}),
        ("--reset --save no", {"reset": np.zeros((6, 2), bool)}),
        ("--no-dx --save every", {"save": True, "need": ("weight", "bias")}),
        ("--saved-dtype x --save every", {"save": True, "saved_dtype": "float16"}),
        ("--param-dtype state --save every", {"save": True, "wide_params": True}),
        ("--save x", {"save": "x", "L": 40}),
        ("--save x --length 6", {"save": "x"}),
        ("--length 1 --save no every", {"L": 1, "save": True}),
    ],
)
def test_options_are_those_of_calls(arguments, given, monkeypatch, nvrtc, new_process):
    given = {"L": 6, **given}
    wide = given.pop("wide_params", False)
    wanted = looked_for(monkeypatch, lambda: layer("sru", "float16", B=2, d=32, **given), wide_params=wide)
    if "no every" in arguments:
        wanted |= looked_for(monkeypatch, lambda: layer("sru", "float16", B=2, d=32, L=1))
    base = "--arch sm_90 --cell sru --dtype float16 --d 32 --batch 2"
    if "--length" not in arguments:
        arguments += f" --length {given['L']}"
    assert wanted == warmed(*base.split(), *arguments.split())
    plain = warmed(*base.split(), "--save", "every" if "every" in arguments else "no", "--length", "6")
    assert wanted != plain  # so the option matters


def test_small_layers_have_one_kernel_more(nvrtc, new_process):
    base = "--arch sm_90 --cell sru --dtype float16 --d 32 --save no".split()
    more = warmed(*base, "--d-in", "32") - warmed(*base)
    assert [made.d_in for _, made, _ in more] == [32]
    assert warmed(*base, "--d-in", "32", "--time-parallel", "yes").isdisjoint(more)


def test_short_sequences(monkeypatch, nvrtc, new_process):
    """They have the kernels of long ones, though a layer keeps no more states than there are steps."""
    base = "--arch sm_90 --cell sru --dtype float64 --d 32 --batch 65 --multiprocessors 1 --save 32".split()
    found = {}
    for L in (6, 40):
        found[L] = looked_for(
            monkeypatch, functools.partial(layer, "sru", "float64", L, 65, 32, save=32), Device(90, 1)
        )
        assert found[L] == warmed(*base, "--length", str(L))
    assert found[6] == found[40] == warmed(*base)


@pytest.mark.parametrize("how, length", [("auto", 3000), ("auto", 70), ("yes", 200), ("no", 3000)])
@pytest.mark.parametrize("cell, save", [("sru_no_v", 3), ("sru", 3), ("sru", True)])
def test_calls_in_parallel_over_time(cell, save, how, length, monkeypatch, nvrtc, new_process):
    how_called = {"auto": "auto", "yes": True, "no": False}[how]
    call = functools.partial(layer, cell, "float32", length, 2, 16, save=save, time_parallel=how_called)
    wanted = looked_for(monkeypatch, call)
    base = f"--arch sm_90 --cell {cell} --dtype float32 --d 16 --time-parallel {how}".split()
    base += ["--save", "every" if save is True else "3"]
    assert wanted == warmed(*base, "--batch", "2", "--length", str(length))
    cut = (how, length) in (("auto", 3000), ("yes", 200))
    assert {(p.forward, p.parallel) for _, p, _ in wanted} == {(True, cut), (False, cut)}
    short = looked_for(monkeypatch, functools.partial(layer, cell, "float32", 5, 2, 16, save=save))
    assert wanted | short == warmed(*base, "--batch", "2") or length < 3000
    assert {(v, replace(p, B=0), a) for v, p, a in wanted | short} <= warmed(*base)


def test_kernels_for_any_batch_size_with_and_without_chunks(new_process):
    """Forward and backward stop being parallel at different batch sizes."""
    for cell, time_parallel in (("sru_no_v", "auto"), ("sru", "auto"), ("sru_no_v", True), ("sru_no_v", False)):
        call = Call(CELLS[cell], "float32", 1, 64, every=3, time_parallel=time_parallel)
        for which in call.passes:
            every_batch = {replace(p, B=0) for B in range(1, 300) for p in call.plans(which, B, DEVICE)}
            found = call.general_plans(which, DEVICE)
            assert every_batch <= set(found), (cell, time_parallel, which)
    kinds = {
        (p.parallel, p.saved_in_chunks)
        for p in Call(CELLS["sru_no_v"], "float32", 1, 64, 3).general_plans("backward", DEVICE)
    }
    assert {(False, False), (True, True)} <= kinds


def test_one_token(monkeypatch, nvrtc, new_process):
    rng = np.random.default_rng(0)
    params = sru_rt.sru_init(32, 32, rng=rng)
    params = {name: params[name] for name in ("weight", "bias", "v")}
    wanted = looked_for(monkeypatch, lambda: sru_rt.sru_step(np.ones((2, 32), np.float32), **params))
    base = "--arch sm_90 --cell sru --dtype float32 --d 32 --batch 2 --save no"
    assert wanted == warmed(*base.split(), "--length", "1")
    assert wanted != warmed(*base.split())


def test_a_token_whose_kernel_forms_u(monkeypatch, nvrtc, new_process):
    """For the batch sizes that go so; others, and those of all when none are named, also go by a product."""

    def fitting(B: int) -> set[tuple]:
        return {(p.d_in, p.B) for _, p, _ in warmed(*base.split(), "--batch", str(B))}

    base = "--arch sm_90 --cell sru --dtype float32 --d 32 --save no --length 1 --d-in 48"
    assert [fitting(B) for B in (1, 8, 9)] == [{(48, 1)}, {(48, 8)}, {(0, 9)}]
    every = {p for _, p, _ in warmed(*base.split())}
    assert {p.B for p in every if p.decodes} == set(range(1, 9)) and {p.B for p in every if not p.decodes} == {0}
    given = warmed(*base.replace("--d-in 48", "").split())
    assert {p for _, p, _ in given} == {p for p in every if not p.decodes}
    assert not any(p.decodes for _, p, _ in warmed(*base.replace("--save no", "--save every").split()))
    many = warmed(*base.split(), "--batch", *map(str, range(1, 11)))
    assert {p.B for _, p, _ in many if p.decodes} == set(range(1, 9))
    assert {p.B for _, p, _ in many if not p.decodes} == {9, 10, 0}
    kernel = next(k for k in warm.kernels(options(*base.split(), "--batch", "3")))
    assert "forms U, d_in=48" in str(kernel)


def test_warmed_tokens_are_those_of_calls(place, monkeypatch, new_process):
    """What steps look for on a GPU, of any number of sequences."""
    seen, really = set(), compile_gpu.cubin

    def spy(variant, made, arch):
        seen.add((variant, made, arch))
        return really(variant, made, arch)

    monkeypatch.setattr(compile_gpu, "cubin", spy)
    if place.name == "gpu":
        facts = launch_gpu.device_facts(0)
        where = f"--arch sm_{facts.arch} --multiprocessors {facts.multiprocessors}"
    else:
        where = "--arch sm_90"
    # In 16 bits nine sequences would be a small layer.
    base = f"{where} --cell mingru --dtype float32 --d 6 --directions 2 --save no --length 1 --d-in 10 --batch 1 8 9"
    weight, bias = np.zeros((2, 2, 6, 10), np.float32), np.zeros((2, 2, 6), np.float32)
    for B in (1, 8, 9):
        sru_rt.mingru_step(*place.put((np.zeros((B, 10), np.float32), weight, bias)))
    assert seen == warmed(*base.split())


@pytest.mark.parametrize(
    "d, dtype, save", [(1, "float32", 0), (64, "float16", 1), (512, "float16", 32), (33, "float16", 1)]
)
def test_kernels_for_any_batch_size(d, dtype, save, new_process):
    """They are those of every batch size there is."""
    call = Call(CELLS["sru"], dtype, 1, d, every=save)
    for device, which in itertools.product((DEVICE, Device(75, 3)), call.passes):
        every_batch = {replace(p, B=0) for B in range(1, 2200) for p in call.plans(which, B, device)}
        found = call.general_plans(which, device)
        assert len(found) == len(set(found)) < 20
        assert every_batch <= set(found)
        if 2200 * d > choose.LOADS[-1] * device.multiprocessors:
            assert every_batch == set(found)


def test_one_of_the_kernels_for_any_batch_size_serves_a_late_comer(monkeypatch, nvrtc, new_process):
    found = warmed(*"--arch sm_90 --cell sru --dtype float32 --d 16 --save every".split())
    assert {p.B for _, p, _ in found} == {0}
    for B in range(1, 9):  # the first batch sizes get kernels of their own
        looked_for(monkeypatch, functools.partial(layer, "sru", "float32", 2, B, 16, save=True))
    late = looked_for(monkeypatch, lambda: layer("sru", "float32", 2, 9, 16, save=True))
    assert late <= found


def test_many_batch_sizes_share_kernels_beyond_their_own(nvrtc, new_process):
    base = "--arch sm_90 --cell sru --dtype float32 --d 16 --save no --batch".split()
    few, many = (warmed(*base, *map(str, range(1, n))) for n in (9, 10))
    assert {p.B for _, p, _ in few} == {*range(1, 9)}
    assert {p.B for _, p, _ in many} == {*range(10)}


def test_several_values_stand_for_calls_with_each(nvrtc, new_process):
    base = "--cell sru sru_no_v --dtype float32 float64 --d 16 32 --batch 3 4 --directions 1 2 --save no every".split()
    base += ["--length", "5"]
    found = warmed("--arch", "sm_80", "90", *base)
    assert len(found) == 2 * 2 * 2 * 2 * 2 * 2 * 3
    assert {a for _, _, a in found} == {80, 90}


# ----------------------------------------------------------------------------------------------------------------------
# warm: the cache


def test_a_warm_cache_is_used(folder, monkeypatch, nvrtc, new_process, capsys):
    arguments = "warm --arch sm_90 --cell sru --dtype float32 --d 16 --batch 3 --save no 2 --length 5".split()
    assert command_line.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(re.search(r": compiled in \d+\.\d\d s$", line) for line in lines[:3])
    assert re.fullmatch(rf"3 kernels in {re.escape(str(folder))}: 3 compiled, 0 cached, \d+\.\d s", lines[3])
    assert len(nvrtc) == len(list(folder.iterdir())) == 3

    new_process()
    for save in (False, 2):
        for variant, made, arch in looked_for(
            monkeypatch, functools.partial(layer, "sru", "float32", 5, 3, 16, save=save)
        ):
            compile_gpu.cubin(variant, made, arch)
    assert len(nvrtc) == 3
    for variant, made, arch in looked_for(monkeypatch, lambda: layer("sru", "float32", 5, 4, 16)):
        compile_gpu.cubin(variant, made, arch)  # another batch size
    assert len(nvrtc) == 4

    assert command_line.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith(": cached") for line in lines[:3]) and "0 compiled, 3 cached" in lines[3]


def test_a_cache_may_be_moved(folder, tmp_path, monkeypatch, nvrtc, new_process):
    arguments = "warm --arch sm_90 --cell sru --dtype float32 --d 16 --batch 3 --save no --time-parallel no".split()
    assert command_line.main(arguments) == 0
    shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.setenv("SRU_RT_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert command_line.main(arguments) == 0
    assert len(nvrtc) == 1
    monkeypatch.setattr(compile_gpu, "version", lambda: "13.0")
    assert command_line.main(arguments) == 0
    assert len(nvrtc) == 2  # code of another NVRTC


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_cache_that_others_can_write_is_refused(folder, nvrtc, capsys):
    folder.mkdir()
    folder.chmod(0o777)
    assert command_line.main("warm --arch sm_90 --cell sru --dtype float32 --d 16".split()) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and f"chmod go-w {folder}" in said.err
    assert not nvrtc


def test_kernels_that_cannot_be_kept_are_an_error(folder, nvrtc, capsys, monkeypatch):
    def full(content, path):
        raise cache.CacheError("sru_rt: the cache folder cannot be written (No space left on device)")

    monkeypatch.setattr(cache, "write", full)
    assert command_line.main("warm --arch sm_90 --cell sru --dtype float32 --d 16".split()) == 1
    assert "No space left on device" in capsys.readouterr().err


@needs_compiler
def test_kernels_for_the_cpu(folder):
    command = "warm --cpu --cell sru --dtype float32".split()
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    assert re.fullmatch(
        r"CPU thread pool: compiled in .* s\nCPU sru float32: compiled in .* s\n2 kernels in .*: 2 compiled, .*\n", out
    )
    assert len(list(folder.glob("*.so"))) == 2
    program = "import numpy as np, sru_rt; sru_rt.sru_forward(np.ones((2, 2, 4), 'f'), np.ones((1, 3, 4, 4), 'f'), "
    program += "np.ones((1, 2, 4), 'f'), np.ones((1, 2, 4), 'f'))"
    env = {**os.environ, "SRU_RT_CPU": "compiled"}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)
    assert len(list(folder.glob("*.so"))) == 2
    status, out, _ = run("doctor", "--json")
    assert json.loads(out)["cache"]["cpu_kernels"] == 2  # what it tries itself is the same kernel


@pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "it runs here")
def test_a_warm_cache_serves_arrays_on_a_gpu(folder, monkeypatch, new_process):
    """The whole way from `warm` to a launch, with stand-ins for CuPy and the GPU."""
    fake_cupy = pytest.importorskip("emu.fake_cupy")
    texts, compile = [], compile_gpu.compile

    def counted(text, options):
        texts.append(text)
        return compile(text, options)

    monkeypatch.setattr(compile_gpu, "compile", counted)
    with fake_cupy.installed(monkeypatch) as cupy:
        arguments = "warm --arch sm_90 --cell sru_no_skip --dtype float32 --d 21 --batch 3 --save no --length 4"
        assert command_line.main([*arguments.split(), "--multiprocessors", "132"]) == 0
        assert len(texts) == 1
        new_process()
        u, params = np.ones((4, 3, 1, 3, 21), np.float32), np.ones((1, 2, 21), np.float32)
        given = [cupy.asarray(a) for a in (u, params, params)]
        h, _ = sru_rt.sru_recurrence(given[0], None, *given[1:], highway=False)
        assert len(texts) == 1
        wanted, _ = sru_rt.sru_recurrence(u, None, params, params, highway=False)
        np.testing.assert_allclose(h.get(), wanted, rtol=1e-5)


def test_kernels_for_any_batch_size_serve_where_there_is_no_other(folder, monkeypatch, nvrtc, new_process):
    call = Call(CELLS["sru"], "float32", 1, 19)
    own = call.plan("forward", 3, DEVICE)
    general = replace(own, B=0)
    chosen = functools.partial(launch_gpu._cached_if_any, call.variant, arch=90)
    assert chosen(own) == own
    compile_gpu.cubin(call.variant, general, 90)
    assert chosen(own) == general and chosen(general) == general
    compile_gpu.cubin(call.variant, own, 90)
    assert chosen(own) == own


# ----------------------------------------------------------------------------------------------------------------------
# warm: what is refused


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ("", 2, "name a GPU architecture, such as --arch sm_90, or pass --cpu"),
        ("--arch sm_90 --dtype float32 --d 8", 2, "--cell is missing"),
        ("--arch sm_90 --cell sru --dtype float32", 2, "--d is missing"),
        ("--cpu --cell sru", 2, "--dtype is missing"),
        ("--arch sm_90 --cell gru --dtype float32 --d 8", 2, "--cell must be one of mingru, .* \\(got 'gru'\\)"),
        ("--arch hopper", 2, "argument --arch: 'hopper' is no architecture such as sm_90"),
        ("--arch sm_90 --d 0", 2, "argument --d: '0' is no positive integer"),
        ("--arch sm_90 --save never", 2, "argument --save: 'never' is no positive integer"),
        ("--arch sm_90 --dtype int8", 2, "argument --dtype: invalid choice: 'int8'"),
        ("--arch sm_70 --cell sru --dtype float32 --d 8", 1, "NVRTC 12.9 does not know sm_70"),
    ],
)
def test_wrong_arguments(arguments, status, message, folder, nvrtc, capsys):
    try:
        got = command_line.main(["warm", *arguments.split()])
    except SystemExit as stop:  # of argparse
        got = stop.code
    said = capsys.readouterr()
    assert (got, said.out) == (status, "")
    assert re.search(message, said.err.splitlines()[-1]), said.err


def test_an_unusual_architecture_needs_its_multiprocessors(folder, nvrtc, capsys, monkeypatch):
    monkeypatch.setattr(compile_gpu, "target", lambda arch: arch)
    base = "warm --arch sm_87 --cell sru --dtype float32 --d 8 --save no --batch 1".split()
    assert command_line.main(base) == 2
    assert "pass --multiprocessors" in capsys.readouterr().err
    assert command_line.main([*base, "--multiprocessors", "16"]) == 0


def test_a_compiler_error_is_one_line(folder, nvrtc, capsys, monkeypatch):
    def fail(text, options):
        raise CompileError("sru_rt: NVRTC 12.9 failed.\noptions: -arch\noutput:\nerror: this\n")

    monkeypatch.setattr(compile_gpu, "compile", fail)
    assert command_line.main("warm --arch sm_90 --cell sru --dtype float32 --d 16".split()) == 1
    assert capsys.readouterr().err == "sru_rt warm: NVRTC 12.9 failed. options: -arch output: error: this\n"


# ----------------------------------------------------------------------------------------------------------------------
# With a real NVRTC


@pytest.fixture
def real_nvrtc():
    """Where CuPy is installed, an NVRTC that is not found is a failure."""
    pytest.importorskip("cupy", reason="needs CuPy, through which NVRTC is called")
    compile_gpu.nvrtc()


def test_a_user_warms_a_cache(real_nvrtc, folder, capsys):
    command = "warm --arch sm_80 --cell sru --dtype bfloat16 --d 64 --batch 2 3 --save no --length 9".split()
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3 and all(re.search(r"compiled in .* s, \d+ registers$", line) for line in lines[:2])
    assert command_line.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.search(r"cached, \d+ registers$", line) for line in lines[:2])
    report = json.loads(run("doctor", "--json")[1])
    assert report["cache"]["gpu_kernels"] == 2
    assert report["cache"]["gpu_bytes"] == sum(path.stat().st_size for path in folder.glob("*.cubin"))


@pytest.mark.parametrize("arch", (75, 90, 120))
def test_registers_are_those_of_the_log(arch, real_nvrtc, new_process):
    call = Call(CELLS["sru"], "float32", 1, 64, every=1)
    text = compile_gpu.unit(call.variant, call.plan("backward", 2, replace(DEVICE, arch=arch)))
    code, log = compile_gpu.compile(text, (f"-arch=sm_{arch}", *compile_gpu.FLAGS))
    used = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(used) == 2 and warm.registers(code) == max(used)


@pytest.mark.parametrize("code", (b"", b"emulated\0text", b"\x7fELF", b"\x7fELF" + bytes(96)))
def test_registers_of_something_else_are_unknown(code):
    assert warm.registers(code) is None


def test_the_planner_reads_nothing_that_is_left_out(new_process):
    """Of the fields that `Call` leaves empty, so that other values of them change no plan."""
    call = Call(CELLS["sru"], "float16", 1, 64, every=2, L=MANY)
    some = [abi.Slot(512, 64)] * 4
    for which, arguments in (("forward", call._forward(8)), ("backward", call._backward(8))):
        given = arguments.given._replace(per_sequence=some, params=some, c0=[512], constants=[1.0], lengths=512)
        full = arguments._replace(given=given)
        full = full if which == "forward" else full._replace(dper_sequence=some, dparams=some, dc0=[512], dc_last=[512])
        assert replace(plan.plan(call.variant, full, DEVICE), B=8) == call.plan(which, 8, DEVICE)
