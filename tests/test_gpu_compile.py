"""Kernels for the GPU are compiled here without one, by both releases of NVRTC, and held to what was recorded of them.

Nothing is run: that is done under the emulation in tests/emu/, and on a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import stat
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sru_rt import choose, chunks, compile_gpu, decode, machine, plan, small, source
from sru_rt.cells import named_cells
from sru_rt.dtypes import IO_DTYPES, state_dtype
from sru_rt.errors import CacheError, CompileError
from sru_rt.graph import topological
from sru_rt.shared_memory import chunk_of_tile
from sru_rt.simplify import count_uses, softplus_shares
from sru_rt.traffic import ITEMSIZE
from sru_rt.variant import Variant

pytest.importorskip("cupy", reason="CuPy, through which kernels for a GPU are compiled, is not installed")

import nvrtc

TOOLS = Path(__file__).parent.parent / "tools"
RELEASES = tuple(nvrtc.WHEELS)
CELLS = {cell.name: cell for cell in named_cells()}


@pytest.fixture(scope="module")
def gpu_budget():
    """The tool that makes the record."""
    name = "gpu_budget"
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def release(major: int) -> Any:
    try:
        return nvrtc.release(major)
    except nvrtc.Missing as error:
        pytest.fail(str(error))


# ----------------------------------------------------------------------------------------------------------------------
# The matrix: everything compiles, nothing spills


@dataclass(frozen=True)
class Scene:
    """Sizes and what is given and wanted: each has a plan of its own."""

    sizes: tuple[int, int, int, int]  # L, B, D, d
    K: int = 32
    mask: bool = False
    reset: bool = False
    any_batch: bool = False
    own_types: bool = False  # inputs in the dtype of the state, kept states in that of x
    need: tuple[str, ...] = ("gates", "inputs", "per_sequence", "params")


SCENES = {
    "few channels": Scene((2048, 2, 1, 512)),
    "usual": Scene((2048, 16, 1, 1024)),
    "many channels": Scene((512, 128, 1, 1024)),
    "both directions": Scene((512, 32, 2, 1024), mask=True),
    "odd": Scene((7, 3, 2, 13), mask=True, reset=True),
    "one step": Scene((1, 16, 1, 512)),
    "any batch": Scene((512, 128, 1, 512), any_batch=True, K=1000),
    "other types": Scene((512, 128, 1, 256), own_types=True, reset=True),
    "parameters alone": Scene((512, 8, 2, 512), need=("params",), K=4),
}
POLICIES = {
    "forward, none": (True, lambda K: 0),
    "forward, all": (True, lambda K: 1),
    "forward, 1 of K": (True, lambda K: K),
    "backward, all": (False, lambda K: 1),
    "backward, 1 of K": (False, lambda K: K),
    # Parallel over time, where the cell allows it.
    "forward, 1 of K, in chunks": (True, lambda K: K),
    "backward, all, in chunks": (False, lambda K: 1),
    "backward, 1 of K, in chunks": (False, lambda K: K),
}
# d at most, d_in and directions of layers of which a kernel forms U itself.
LAYERS = ((128, 128, 1), (480, 33, 2), (480, 40, 2), (128, 192, 2))
ARCHS = tuple(machine.USUAL_MULTIPROCESSORS)
# Kernels that NVRTC takes several seconds for, where others take half of one.
LONG = ("backward, all, in chunks", "backward, 1 of K, in chunks")


def matrix(major: int) -> list[tuple[str, str, str, str, int]]:
    """(cell, dtype, policy, scene, architecture).

    With the library's main release every variant of SRU, dtype and policy meet, and of the other cells every other
    combination; of LONG half as many. Scenes and architectures take turns, in cycles of 9 and 7, which have no factor
    in common with each other or with the 32 or 16 dtypes and policies, so that any two values of different columns
    meet. The other release has those of these rows that it takes for the latter, looked for among LONG in the end.
    """
    numbered = itertools.product(enumerate(CELLS), enumerate(IO_DTYPES), enumerate(POLICIES))
    scenes, archs = itertools.cycle(SCENES), itertools.cycle(ARCHS)
    rows = []
    for (i, cell), (j, dtype), (k, policy) in numbered:
        every = 1 if cell.startswith("sru") else 2
        if (i + j + k) % every == 0:
            row = (cell, dtype, policy, next(scenes), next(archs))
            if policy not in LONG or (i // 2 * 2 + i + j + k) % (2 * every) == 0:
                rows.append(row)
    if major == 12:
        return rows
    met: set[Any] = set()
    long_last = sorted(rows, key=lambda row: row[2] in LONG)
    return [row for row in long_last if len(met) < len(met := met | set(pairs(row)))]


def pairs(row: tuple[Any, ...]) -> Iterator[Any]:
    """Two values each, with the numbers of their columns."""
    return itertools.combinations(enumerate(row), 2)


def planned(cell: str, dtype: str, policy: str, scene: str, arch: int) -> tuple[Variant, plan.Plan]:
    s, (forward, every) = SCENES[scene], POLICIES[policy]
    wide = (1 << len(CELLS[cell].inputs)) - 1 if s.own_types else 0
    variant = Variant(CELLS[cell], dtype, dtype if s.own_types else state_dtype(dtype), wide)
    arguments = nvrtc.arguments(
        variant.cell, dtype, s.sizes, forward=forward, every=every(s.K), mask=s.mask, reset=s.reset, need=s.need
    )
    if policy.endswith("in chunks") and s.sizes[0] > 1:
        cut = chunk_of_tile(variant, forward) if chunks.possible(variant.cell, forward) else 0
        arguments = arguments._replace(given=arguments.given._replace(chunk=cut, carry=1 << 20))
        arguments = arguments if forward else arguments._replace(saved_chunk=chunks.counted_in(variant.cell, 64))
    made = plan.plan(variant, arguments, machine.Device(arch, machine.USUAL_MULTIPROCESSORS[arch]))
    return variant, replace(made, B=0) if s.any_batch else made


def compiled(major: int, arch: int) -> Iterator[tuple[tuple[Any, ...], plan.Plan, int, str]]:
    """Plan, bytes of dynamic shared memory and log of every row of the matrix for an architecture."""
    for row in matrix(major):
        policy, scene = row[2:4]
        if row[-1] == arch:
            variant, made = planned(*row)
            text = compile_gpu.unit(variant, made)
            log = nvrtc.release(major).compile(text, (f"-arch=sm_{arch}", *compile_gpu.FLAGS))[1]
            cut = chunk_of_tile(variant, made.forward) if made.parallel else 0
            yield row, made, plan.shared_bytes(variant, made, POLICIES[policy][1](SCENES[scene].K), cut), log


@pytest.mark.parametrize("major", RELEASES)
def test_any_two_options_meet_in_the_matrix(major):
    columns = (CELLS, IO_DTYPES, POLICIES, SCENES, ARCHS)
    for i, j in itertools.combinations(range(len(columns)), 2):
        met = {(row[i], row[j]) for row in matrix(major)}
        assert met == set(itertools.product(columns[i], columns[j]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("major", RELEASES)
def test_kernels_compile_and_nothing_spills(major, arch):
    assert release(major).version[0] == major
    faults, n = [], 0
    for row, made, dynamic, log in compiled(major, arch):
        found = nvrtc.resources(log)
        assert set(found) == set(made.kernels)
        for kernel, used in found.items():
            n += 1
            aside = kernel.startswith("sum_") or kernel == "clear"
            threads = 256 if aside else made.block
            shared = used.shared + (0 if aside else dynamic)
            if used.spill_stores or used.spill_loads or used.stack:
                faults.append(f"{row}: {kernel} spills: {used}, plan {made}")
            if used.registers * threads > 1 << 16 or shared > 48 << 10:
                faults.append(f"{row}: a block of {kernel} does not fit: {used}, plan {made}, {shared} bytes")
        for warning in re.findall(r"^.*\bwarning\b.*$", log, re.MULTILINE):
            faults.append(f"{row}: {warning}")
    assert not faults, "\n".join(faults)
    assert n >= 10


# Of a token whose kernel forms U: sequences, directions, d, d_in.
TOKENS = ((1, 1, 1024, 1024), (8, 1, 1024, 1024), (5, 2, 13, 333), (8, 2, 64, 3072), (3, 1, 512, 4100))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("major", RELEASES)
def test_kernels_of_a_token_compile_and_nothing_spills(major, arch):
    """The combinations are shared out among the architectures; by the other release, one of five of them."""
    faults, among = [], len(ARCHS) * (1 if major == 12 else 5)
    rows = itertools.product(CELLS.values(), IO_DTYPES, TOKENS)
    for i, (cell, dtype, (B, D, d, d_in)) in enumerate(rows):
        if (i + ARCHS.index(arch)) % among or not decode.fits(dtype, (1, B, D, d), d_in):
            continue
        variant = Variant(cell, dtype, state_dtype(dtype))
        arguments = nvrtc.arguments(cell, dtype, (1, B, D, d), d_in=d_in)
        made = plan.plan(variant, arguments, machine.Device(arch, machine.USUAL_MULTIPROCESSORS[arch]))
        log = release(major).compile(compile_gpu.unit(variant, made), (f"-arch=sm_{arch}", *compile_gpu.FLAGS))[1]
        used = nvrtc.resources(log)["forward"]
        assert made.decodes and used.shared >= B * d_in * ITEMSIZE[dtype]
        if used.spill_stores or used.spill_loads or used.stack or used.registers > 255 or used.shared > 48 << 10:
            faults.append(f"{cell.name} {dtype} {B, D, d, d_in}: {used}, plan {made}")
        faults += re.findall(r"^.*\bwarning\b.*$", log, re.MULTILINE)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch >= small.OLDEST])
@pytest.mark.parametrize("major", RELEASES)
def test_kernels_that_form_u_compile_and_nothing_spills(major, arch):
    """The largest that a block holds, and odd ones; cells and their dtypes take turns over architectures."""
    faults, device = [], machine.Device(arch, machine.USUAL_MULTIPROCESSORS[arch])
    for i, name in [*enumerate(CELLS)][ARCHS.index(arch) % 5 :: 5]:
        (d, d_in, D), cell, dtype = LAYERS[i // 2 % 4], CELLS[name], ("float16", "bfloat16")[(i + major) % 2]
        d = max(n for n in range(1, d + 1) if small.block(len(cell.gates), n, d_in))
        variant = Variant(cell, dtype, "float32", i % 3 % 2 * ((1 << len(cell.inputs)) - 1))
        given = nvrtc.arguments(cell, dtype, (32, 32, D, d), mask=D == 2, reset=D == 2, d_in=d_in)
        made = plan.plan(variant, given, device)
        log = release(major).compile(compile_gpu.unit(variant, made), (f"-arch=sm_{arch}", *compile_gpu.FLAGS))[1]
        (used,) = nvrtc.resources(log).values()
        if used.spill_stores or used.spill_loads or used.stack or "warning" in log:
            faults.append(f"{name}, d = {d}, d_in = {d_in}: {log}")
        assert used.shared == small.block(len(cell.gates), d, d_in).shared
        assert used.registers * made.threads <= 1 << 16
    assert not faults, "\n".join(faults)


def test_plans_of_the_matrix_differ():
    plans = [planned(*row)[1] for row in matrix(12)]
    assert {made.width for made in plans} == {1, 2}
    assert {made.depth for made in plans} == set(choose.DEPTHS)
    assert {made.B == 0 for made in plans} == {made.D == 2 for made in plans} == {False, True}
    assert {made.parallel for made in plans} == {made.saved_in_chunks for made in plans} == {False, True}
    assert {made.shoots for made in plans if made.parallel and made.forward} == {False, True}
    assert {made.reduce_reads_state for made in plans if made.parallel and not made.forward} == {False, True}
    recomputing = [made for made in plans if made.keep > 1 and not made.forward]
    assert {made.scratch_in_shared for made in recomputing} == {False, True}
    assert {made.staged for made in recomputing} == {0, 1, 2, 3}


# ----------------------------------------------------------------------------------------------------------------------
# The budget

# By the release that made the record, other builds of which may differ a little; by any other, which allocates and
# schedules differently: those are only held to a ceiling.
REGISTERS = {12: lambda n: n + 4, 13: lambda n: n * 1.15 + 12}
GROWTH = 0.05
RERECORD = "if that is meant, run `python tools/gpu_budget.py` and commit what it writes"


@pytest.fixture(scope="module")
def measured(gpu_budget):
    release(gpu_budget.RELEASE)
    return gpu_budget.measured(gpu_budget.entries())


def compare(key: str, was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel, beside its record."""
    faults = []
    if now["spills"]:
        faults.append(f"{key}: spills {now['spills']} bytes")
    for name in ("width", "depth", "threads", "shared", "staged", "load_bits"):
        if now.get(name) != was.get(name):
            faults.append(f"{key}: {name} was {was.get(name)}, is {now.get(name)}: {RERECORD}")
    if now["registers"] > REGISTERS[12](was["registers"]):
        faults.append(f"{key}: took {was['registers']} registers, takes {now['registers']}: {RERECORD}")
    for name in ("instructions", "mufu", "loads", "stores"):
        if now.get(name, 0) > was.get(name, 0) * (1 + GROWTH):
            faults.append(f"{key}: {name} were {was[name]}, are {now[name]} for a channel and step: {RERECORD}")
    if now["registers"] < was["registers"] - 8 or now.get("instructions", 0) < was.get("instructions", 0) * (
        1 - GROWTH
    ):
        faults.append(f"{key}: was {was}, is {now}: better, so that the record no longer holds it; {RERECORD}")
    return faults


@pytest.mark.slow
def test_kernels_take_no_more_than_recorded(gpu_budget, measured):
    recorded = gpu_budget.recorded()
    assert set(recorded) == set(measured), RERECORD
    faults = [fault for key in measured for fault in compare(key, recorded[key], measured[key])]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_kernels_of_another_release_take_little_more(gpu_budget):
    """Those of the record that keep all states."""
    nvrtc_13 = release(13)
    recorded = gpu_budget.recorded()
    some = [entry for entry in gpu_budget.entries() if "all states" in entry.which]
    assert nvrtc_13.version >= (13, 0) and len(some) > 30
    with ThreadPoolExecutor(2) as pool:
        logs = pool.map(lambda entry: entry.compile(13)[1], some)
        faults = []
        for entry, log in zip(some, logs):
            used, was = nvrtc.resources(log)[entry.kernel], recorded[entry.key]["registers"]
            if used.registers > REGISTERS[13](was) or used.spill_stores or used.spill_loads:
                faults.append(f"{entry.key}: took {was} registers, now {used}")
    assert not faults, "\n".join(faults)


def test_record_is_of_kernels_that_do_not_spill(gpu_budget):
    for key, kernel in gpu_budget.recorded().items():
        assert kernel["spills"] == 0, key
        assert kernel["registers"] <= 255, key


@pytest.mark.parametrize(
    "change, says",
    [
        ({"registers": 105}, "took 100 registers, takes 105"),
        ({"registers": 90}, "better"),
        ({"spills": 4}, "spills 4 bytes"),
        ({"instructions": 31.6}, "instructions were 30.0, are 31.6"),
        ({"instructions": 28.0}, "better"),
        ({"mufu": 5.0}, "mufu were 4.0, are 5.0"),
        ({"depth": 16}, "depth was 8, is 16"),
        ({"load_bits": {"16": 4.0}}, "load_bits was {'32': 4.0}, is {'16': 4.0}"),
        ({"registers": 104, "instructions": 31.4}, None),
        ({"registers": 92, "instructions": 28.6}, None),
    ],
)
def test_comparison_with_the_record(change, says):
    was = dict(width=1, depth=8, threads=32, shared=0, registers=100, spills=0)
    was |= dict(instructions=30.0, mufu=4.0, loads=4.0, stores=1.0, load_bits={"32": 4.0})
    faults = compare("kernel", was, was | change)
    assert len(faults) == (says is not None)
    assert says is None or says in faults[0]


def test_tables_are_those_of_the_record(gpu_budget):
    text = gpu_budget.PAGE.read_text()
    assert gpu_budget.page(text, gpu_budget.tables(gpu_budget.recorded())) == text, (
        "run `python tools/gpu_budget.py --tables` and commit what it writes"
    )


def test_special_functions_and_traffic_are_those_of_the_formula(gpu_budget):
    """A sigmoid in float32 is one exponential and one reciprocal; so are a tanh and a softplus; a share of softpluses
    takes one exponential more. A ring is filled by loads of 128 bits, which together read every gate and input once.
    """
    recorded = gpu_budget.recorded()
    for name, cell in CELLS.items():
        outputs = [*cell.formula.new_state, cell.formula.h]
        nodes = topological(outputs)
        functions = sum(node.op in ("sigmoid", "tanh", "softplus") for node in nodes)
        shares = len(softplus_shares(nodes, count_uses(nodes, outputs)))  # of three such functions each
        kernel = recorded[gpu_budget.Entry(name, "float32", "forward, all states kept").key]
        assert kernel["mufu"] == 2 * functions - 3 * shares, name
        bits = sum(int(width) * loads for width, loads in kernel["load_bits"].items())
        assert bits == 32 * (len(cell.gates) + len(cell.inputs)), name
        assert kernel["stores"] == 1 + len(cell.state), name


# ----------------------------------------------------------------------------------------------------------------------
# Counting in machine code

LOOPS = """
.text.other:
        /*0000*/                   EXIT ;
	.section	.text.forward,"ax",@progbits
.text.forward:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDG.E R3, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.NA.CONSTANT R4, desc[UR4][R2.64+0x4] ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
        /*0040*/               @P1 LDG.E R4, desc[UR4][R2.64+0x4] ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/               @P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0070*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0080*/                   IMAD.MOV.U32 R4, RZ, RZ, R5 ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/               @P3 BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   FADD R4, R4, 1 ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5) ;
        /*00f0*/                   NOP ;
	.section	.text.later,"ax",@progbits
"""


def test_the_innermost_loop_is_counted_with_what_stands_out_of_line():
    counted = nvrtc.steady(LOOPS, "forward", [(2, 1, "LDG")], 1)
    assert counted == nvrtc.Steady(instructions=5.0, mufu=0.5, loads=1.0, stores=0.5, moves=0.5, load_bits={"32": 1.0})


def test_loads_are_told_apart_by_their_width():
    """As the machine code names them, whatever stands behind the width; an address of 64 bits is none."""
    text = LOOPS.replace("@P1 LDG.E R4", "@P1 LDG.E.U16.CONSTANT R4").replace("LDG.E.NA.CONSTANT", "LDG.E.64.CONSTANT")
    assert nvrtc.steady(text, "forward", [(2, 1, "LDG")], 1).load_bits == {"16": 0.5, "64": 0.5}
    text = LOOPS.replace("@P1 LDG.E R4", "@P1 LDG.E.128 R4")
    assert nvrtc.steady(text, "forward", [(2, 1, "LDG")], 1).load_bits == {"32": 0.5, "128": 0.5}


def test_all_instructions_of_a_kernel():
    assert (nvrtc.instructions(LOOPS, "forward"), nvrtc.instructions(LOOPS, "other")) == (15, 1)


def test_a_kernel_without_such_a_loop_is_refused():
    with pytest.raises(RuntimeError, match=r"no loop of \[\(3, 1, 'LDG'\)\]"):
        nvrtc.steady(LOOPS, "forward", [(2, 1, "LDG"), (3, 1, "LDG")], 1)
    with pytest.raises(RuntimeError, match="no kernel backward"):
        nvrtc.steady(LOOPS, "backward", [(1, 1, "LDG")], 1)


def test_spills_are_seen():
    """A block of 1024 threads leaves each of them 64 registers, in which rows of 8 steps have no room."""
    variant, made = planned("sru", "float32", "backward, all", "usual", 90)
    made = replace(made, laps=0)
    used = []
    for threads in (made.threads, 1024):
        text = compile_gpu.unit(variant, replace(made, threads=threads))
        used.append(nvrtc.resources(compile_gpu.compile(text, ("-arch=sm_90", *compile_gpu.FLAGS))[1])["backward"])
    assert used[0].spill_stores == used[0].spill_loads == used[0].stack == 0 and used[0].registers > 64
    assert used[1].spill_stores > 0 and used[1].spill_loads > 0 and used[1].stack > 0 and used[1].registers <= 64


# ----------------------------------------------------------------------------------------------------------------------
# Compiling and the cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SRU_RT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """The options of every compilation there is."""
    seen = []
    original = compile_gpu.compile

    def compile_(text, options):
        seen.append(options)
        return original(text, options)

    monkeypatch.setattr(compile_gpu, "compile", compile_)
    return seen


@pytest.fixture
def kernel():
    return planned("sru_basic_no_v", "float32", "forward, all", "one step", 90)


def test_second_time_comes_from_the_cache(folder, compilations, kernel):
    first = compile_gpu.cubin(*kernel, 90)
    assert first.startswith(b"\x7fELF")
    assert compile_gpu.cubin(*kernel, 90) == first
    assert len(compilations) == 1
    (entry,) = folder.glob("*.cubin")
    assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("change", ["architecture", "plan", "dtype", "headers", "NVRTC"])
def test_what_is_compiled_in_is_part_of_the_key(folder, compilations, kernel, change, monkeypatch):
    compile_gpu.cubin(*kernel, 90)
    variant, made = kernel
    arch = 90
    if change == "architecture":
        arch = 80
    elif change == "plan":
        made = replace(made, threads=64)
    elif change == "dtype":
        variant = replace(variant, dtype="bfloat16")
    elif change == "headers":
        monkeypatch.setattr(source, "digest", lambda: "another")
    else:
        monkeypatch.setattr(compile_gpu, "version", lambda: "12.8")
    compile_gpu.cubin(variant, made, arch)
    assert len(compilations) == len(list(folder.glob("*.cubin"))) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_damaged_entry_is_made_anew(folder, compilations, kernel, damage):
    first = compile_gpu.cubin(*kernel, 90)
    (entry,) = folder.glob("*.cubin")
    content = bytearray(entry.read_bytes())
    if damage == "changed":
        content[100] ^= 1
    entry.write_bytes(b"" if damage == "emptied" else content[: -50 if damage == "cut" else None])
    assert compile_gpu.cubin(*kernel, 90) == first
    assert len(compilations) == 2
    assert compile_gpu.cubin(*kernel, 90) == first
    assert len(compilations) == 2


@pytest.fixture
def warned(monkeypatch):
    """The texts of the library's own warnings."""
    texts = []
    monkeypatch.setattr(compile_gpu, "warn_once", lambda topic, text: texts.append(text))
    return texts


def test_without_a_cache_it_is_compiled_each_time(folder, compilations, kernel, warned):
    folder.write_text("a file, where the folder should be")
    first = compile_gpu.cubin(*kernel, 90)
    assert compile_gpu.cubin(*kernel, 90) == first
    assert len(compilations) == len(warned) == 2
    assert str(folder) in warned[0] and "SRU_RT_CACHE_DIR" in warned[0] and "anew" in warned[0]


def test_what_cannot_be_kept_is_compiled_once(folder, compilations, kernel, warned, monkeypatch):
    def fail(content: bytes, path: Path) -> None:
        raise CacheError("sru_rt: the disk is full")

    monkeypatch.setattr(compile_gpu.cache, "write", fail)
    assert compile_gpu.cubin(*kernel, 90).startswith(b"\x7fELF")
    assert len(compilations) == len(warned) == 1
    assert "the disk is full" in warned[0]


def test_question_whether_it_is_cached(folder, compilations, kernel):
    assert not compile_gpu.is_cached(*kernel, 90)
    compile_gpu.cubin(*kernel, 90)
    assert compile_gpu.is_cached(*kernel, 90)
    assert not compile_gpu.is_cached(*kernel, 80)
    assert len(compilations) == 1


def test_a_kernel_is_the_same_in_every_process(folder, kernel):
    """So that a cache filled beforehand is found."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_gpu_compile as t\n"
        "t.compile_gpu.cubin(*t.planned('sru_basic_no_v', 'float32', 'forward, all', 'one step', 90), 90)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent)], check=True)
    (entry,) = folder.glob("*.cubin")
    before = os.stat(entry).st_mtime_ns
    compile_gpu.cubin(*kernel, 90)
    assert [os.stat(e).st_mtime_ns for e in folder.glob("*.cubin")] == [before]


class _Nvrtc(types.SimpleNamespace):
    """What compile_gpu asks of CuPy's binding."""

    def __init__(self, known=(75, 80, 86, 90, 100, 120), version=(12, 4)):
        super().__init__(getSupportedArchs=lambda: list(known), getVersion=lambda: version)


@pytest.mark.parametrize(
    "arch, known, expected",
    [
        (90, (75, 80, 90), 90),
        (89, (75, 80, 86, 90), 86),
        (121, (90, 100, 120), 120),
        (103, (90, 100, 120), 100),
    ],
)
def test_a_newer_minor_of_a_known_generation_takes_the_nearest_older_one(arch, known, expected, monkeypatch):
    monkeypatch.setattr(compile_gpu, "nvrtc", lambda: _Nvrtc(known))
    assert compile_gpu.target(arch) == expected


@pytest.mark.parametrize("arch, known", [(130, (90, 100, 120)), (75, (80, 90)), (86, (87, 89, 90)), (120, (90, 100))])
def test_unknown_architecture(arch, known, monkeypatch):
    monkeypatch.setattr(compile_gpu, "nvrtc", lambda: _Nvrtc(known))
    with pytest.raises(CompileError) as caught:
        compile_gpu.target(arch)
    message = str(caught.value)
    assert f"NVRTC 12.4 does not know sm_{arch}, only sm_{known[0]}, sm_{known[1]}" in message
    assert "pip install 'sru_rt[cuda12]'" in message


def test_missing_cupy(kernel, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(
        CompileError, match=r"through CuPy, which cannot be imported \(.*pip install 'sru_rt\[cuda12\]'"
    ):
        compile_gpu.cubin(*kernel, 90)


def test_missing_nvrtc(kernel, folder, monkeypatch):
    from cupy.cuda import nvrtc as binding

    def fail() -> None:
        raise RuntimeError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr(binding, "getVersion", fail)
    with pytest.raises(CompileError) as caught:
        compile_gpu.cubin(*kernel, 90)
    message = str(caught.value)
    assert "NVRTC, which compiles kernels for the GPU, was not found (libnvrtc.so.12: cannot open" in message
    assert "pip install 'sru_rt[cuda12]'" in message


def test_an_error_of_the_compiler_is_shown_with_its_log():
    with pytest.raises(CompileError) as caught:
        compile_gpu.compile("this is no program;", ("-arch=sm_90", *compile_gpu.FLAGS))
    message = str(caught.value)
    assert f"NVRTC {compile_gpu.version()} failed" in message
    assert "options: -arch=sm_90 --std=c++17" in message
    assert re.search(r"sru_rt\.cu\(1\): error", message)


def test_sizes_of_the_arguments_are_compared(monkeypatch):
    """Python and C++ declare the same struct; a kernel of which that is not true does not compile."""
    variant, made = planned("sru", "float32", "forward, all", "one step", 90)
    text = compile_gpu.unit(variant, made)
    size = compile_gpu.abi.layout(variant.cell, True).size
    assert f", plan, {size})" in text
    with pytest.raises(CompileError, match=r"arguments\.h and sru_rt/abi\.py disagree"):
        compile_gpu.compile(text.replace(f", plan, {size})", f", plan, {size + 8})"), ("-arch=sm_90",))
