"""The emulation of CUDA on the CPU: what it computes, and that it finds bugs.

What it runs is trusted because the bugs of emu/bugs.cuh are found, each in the modes that are to find it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from emu import bugs, emulator
from sru_rt import source

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not()),
]

ORDERS = (0, 1, 2, 7)


def pointer(array: np.ndarray) -> np.uint64:
    return np.uint64(array.ctypes.data)


def function(body: str, parameters: str = "float *out", **options) -> emulator.Function:
    text = f'extern "C" __global__ void kernel({parameters}) {{\n{body}\n}}\n'
    return emulator.Module(text, mode="plain", **options).get_function("kernel")


def result(body: str, n: int, dtype: str = "float32", block: tuple[int, ...] = (32,), **launch) -> np.ndarray:
    """What a kernel without inputs writes to `out`."""
    out = np.zeros(n, dtype)
    kinds = {"float32": "float", "float64": "double", "int32": "int", "uint32": "unsigned"}
    function(body, f"{kinds[dtype]} *out")((1,), block, (pointer(out),), **launch)
    return out


def fails(body: str, match: str, grid: tuple[int, ...] = (1,), block: tuple[int, ...] = (32,), **launch) -> None:
    out = np.zeros(1024, np.float32)
    with pytest.raises(RuntimeError, match=match):
        function(body)(grid, block, (pointer(out),), **launch)


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs


def outcomes(mode: str) -> dict[str, bugs.Outcome]:
    if reason := emulator.preload(mode)[1]:
        pytest.skip(reason)
    status, output = emulator.run_sanitized([str(Path(bugs.__file__)), *map(str, ORDERS)], mode)
    assert status == 0, output[-4000:]
    return {o["bug"] if o["bug"] != "none" else o["kernel"]: bugs.Outcome(**o) for o in json.loads(output)}


@pytest.fixture(scope="module", params=bugs.MODES)
def found(request) -> tuple[str, dict[str, bugs.Outcome]]:
    return request.param, outcomes(request.param)


def test_the_right_kernels_are_right_in_every_mode_and_order(found):
    for kernel in (bugs.SUMS, bugs.TURNS):
        outcome = found[1][kernel]
        assert outcome.status == 0
        assert outcome.output == "right\n" * len(ORDERS)


def test_planted_bugs_are_found(found):
    mode, all_outcomes = found
    missed = {}
    for bug, planted in bugs.PLANTED.items():
        if mode in planted.found and not re.search(planted.found[mode], all_outcomes[bug].output):
            missed[bug] = all_outcomes[bug].output
    assert not missed
    assert sum(mode in planted.found for planted in bugs.PLANTED.values()) >= 13


def test_each_bug_of_the_source_must_be_found_in_some_mode():
    assert list(bugs.numbers()) == ["none", *bugs.PLANTED]
    assert all(planted.found for planted in bugs.PLANTED.values())


def test_sanitizers_name_the_line_and_the_threads(found):
    mode, all_outcomes = found
    lines = bugs.SOURCE.read_text().split("\n")

    def line_of(text: str) -> int:
        return next(i for i, line in enumerate(lines, 1) if text in line)

    if mode == "asan":
        output = all_outcomes["write_past_array"].output
        assert f"bugs.cuh:{line_of('if (BUG(write_past_array))')}\n" in output
        assert re.search(r"in rows_in_turn, block \(0,0,0\) thread \(0,0,0\)", output)
    elif mode == "tsan":
        output = all_outcomes["no_barrier"].output
        assert f"bugs.cuh:{line_of('part[warp][lane] = sum;')} " in output
        assert re.search(r"Thread T\d+ 'block \(0,0,0\) thread \(\d+,\d,0\)'", output)
    else:
        output = all_outcomes["misaligned_instruction"].output
        assert f"bugs.cuh:{line_of('if (BUG(misaligned_instruction))')}\n" in output


def test_nvrtc_compiles_the_kernels_with_the_bugs():
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")
    ptx = (source.cuda_dir() / "ptx.h").read_bytes()
    program = nvrtc.createProgram(bugs.SOURCE.read_text(), "bugs.cu", [ptx], [b"ptx.h"])
    try:
        nvrtc.compileProgram(program, ["-arch=sm_90", "--std=c++17"])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


# ----------------------------------------------------------------------------------------------------------------------
# Threads, blocks and what they exchange


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("resident", [1, 3])
def test_every_thread_of_every_block_runs_once(order, resident):
    out = np.zeros((3, 2, 4, 2, 3, 5), np.int32)
    body = """
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int n = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    out[n] += n;
    """
    function(body, "int *out")((4, 2, 3), (5, 3, 2), (pointer(out),), order=order, resident=resident)
    assert (out.ravel() == np.arange(out.size)).all()


def test_orders():
    body = "out[atomicAdd(count, 1)] = blockIdx.x * 2 + threadIdx.x;"

    def ran(order: int) -> list[int]:
        out, count = np.zeros(8, np.int32), np.zeros(1, np.int32)
        kernel = function(body, "int *out, int *count")
        kernel((4,), (2,), (pointer(out), pointer(count)), order=order, resident=1)
        return out.tolist()

    assert ran(0) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert ran(1) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert ran(2) == ran(2)
    assert len({tuple(ran(order)) for order in range(10)}) > 5
    assert all(sorted(ran(order)) == ran(0) for order in range(10))


def test_the_environment_chooses_mode_and_order(monkeypatch):
    monkeypatch.setenv("SRU_RT_EMU_ORDER", "1")
    assert emulator.default_order() == 1
    out = np.zeros(2, np.int32)
    body = "if (threadIdx.x) out[0] = out[1]; else out[1] = 5;"  # a race, whose outcome tells the order
    function(body, "int *out")((1,), (2,), (pointer(out),))
    assert out.tolist() == [0, 5]
    monkeypatch.setenv("SRU_RT_EMU_MODE", "tsan")
    with pytest.raises(RuntimeError, match=r"libtsan\.so in the process; start it by emulator\.run_sanitized"):
        emulator.Module('extern "C" __global__ void kernel() {}')
    monkeypatch.setenv("SRU_RT_EMU_MODE", "fast")
    with pytest.raises(ValueError, match="'fast'; it must be one of plain, asan, tsan"):
        emulator.Module('extern "C" __global__ void kernel() {}')


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(order, width):
    """Against the definition in the CUDA C++ Programming Guide."""
    out = np.zeros((4, 32), np.float64)
    body = f"""
    const int lane = threadIdx.x;
    const double x = 100 + lane;
    out[lane] = __shfl_sync(0xffffffff, x, lane * 5 + 1, {width});
    out[32 + lane] = __shfl_up_sync(0xffffffff, x, 3, {width});
    out[64 + lane] = __shfl_down_sync(0xffffffff, x, 3, {width});
    out[96 + lane] = __shfl_xor_sync(0xffffffff, x, 5, {width});
    """
    function(body, "double *out")((1,), (32,), (pointer(out),), order=order)
    lane = np.arange(32)
    start = lane // width * width
    up, down = lane - 3, lane + 3
    expected = [
        start + (lane * 5 + 1) % width,
        np.where(up < start, lane, up),
        np.where(down >= start + width, lane, down),
        lane ^ 5,
    ]
    assert (out == 100 + np.array(expected)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_votes_and_partial_masks(order):
    out = np.zeros(32, np.uint32)
    body = """
    const int lane = threadIdx.x;
    const unsigned odd = 0xaaaaaaaa, mine = lane & 1 ? odd : ~odd;
    unsigned ballot;
    if (lane & 1) ballot = __ballot_sync(mine, lane < 8);
    else ballot = __ballot_sync(mine, lane >= 8);
    __syncwarp();
    const int any = __any_sync(mine, lane == 6), all = __all_sync(mine, lane & 1);
    out[lane] = ballot + any * 2 + all;
    """
    function(body, "unsigned *out")((1,), (32,), (pointer(out),), order=order)
    odd, even = 0xAA + 1, 0x55555500 + 2
    assert out.tolist() == [even, odd] * 16


def test_barriers_that_count():
    body = """
    const int x = threadIdx.x;
    if (x == 63) return;  // the others do not wait for it
    out[x * 3] = __syncthreads_count(x < 10);
    out[x * 3 + 1] = __syncthreads_or(x == 5);
    out[x * 3 + 2] = __syncthreads_and(x < 63);
    """
    assert result(body, 192, "int32", (64,)).tolist() == [10, 1, 1] * 63 + [0, 0, 0]


def test_atomics():
    out = np.array([0, 0, 100, 0, 0, 7], np.int32)
    body = """
    const int x = threadIdx.x;
    atomicAdd(out, x);
    atomicMax(out + 1, x);
    atomicMin(out + 2, x - 5);
    atomicOr(out + 3, 1 << (x % 20));
    atomicCAS(out + 4, 0, 9);
    if (x == 0) out[4] += atomicExch(out + 5, 3);
    """
    function(body, "int *out")((1,), (64,), (pointer(out),))
    assert out.tolist() == [2016, 63, -5, 2**20 - 1, 16, 3]


# ----------------------------------------------------------------------------------------------------------------------
# Shared memory


def test_static_and_dynamic_shared_memory():
    body = """
    extern __shared__ __align__(16) unsigned char bytes[];
    __shared__ __align__(64) float a[2][3], b;
    __shared__ volatile double c[
        2];
    const bool nothing = ((unsigned long long)&a[0][0]) % 64 == 0 && ((unsigned long long)bytes) % 32 == 16;
    out[threadIdx.x] = nothing && a[1][2] != a[1][2] && b != b && c[1] != c[1] && bytes[threadIdx.x] == 0xff;
    __syncthreads();
    bytes[threadIdx.x] = 1, a[1][threadIdx.x % 3] = b = c[0] = 1;  // what the next block must not see
    """
    out = np.zeros(8, np.float32)
    kernel = function(body)
    for resident in (1, 2):
        out[:] = 0
        kernel((3,), (8,), (pointer(out),), 8, resident=resident)
        assert (out == 1).all()


def test_each_instance_of_a_template_has_its_own_shared_memory():
    text = """
    template <int n> __device__ float *mine() { __shared__ float a[n], b[n]; return threadIdx.x ? b : a; }
    template <class T, int n> __global__ void pair(T *out) {
      const float *p[] = {mine<4>(), mine<5>(), mine<4>()};
      out[threadIdx.x] = p[0] != p[1] && p[0] == p[2];
    }
    """
    module = emulator.Module(text, mode="plain", instances=["pair<float, 2>", "pair<double, 3>"])
    for name, dtype in (("pair<float, 2>", np.float32), ("pair<double, 3>", np.float64)):
        out = np.zeros(2, dtype)
        module.get_function(name)((1,), (2,), (pointer(out),))
        assert out.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        (
            "__shared__ float x;",
            'struct x_emu_shared { float it; }; auto &x = emu::shared<x_emu_shared>([] {}, "x").it;',
        ),
        ("extern __shared__ Pair<int, 2> x[];", "Pair<int, 2> *x = emu::dynamic_shared<Pair<int, 2>>();"),
    ],
)
def test_declarations_of_shared_memory(declaration, expected):
    assert emulator.replace_shared(declaration) == expected


@pytest.mark.parametrize(
    "declaration",
    ["__shared__ float x = 1;", "__shared__ x;", "extern __shared__ float x;", "__shared__ float x[2]{};"],
)
def test_declarations_that_are_no_cuda(declaration):
    with pytest.raises(ValueError, match="cannot read"):
        emulator.replace_shared(declaration)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def test_a_struct_is_passed_by_value():
    text = """
    struct Inner { double a; short b; };
    struct Given { float *out; long long n; Inner inner[2]; unsigned char last; };
    extern "C" __global__ void kernel(const __grid_constant__ Given g) {
      if (threadIdx.x < g.n) g.out[threadIdx.x] = g.inner[1].a * g.inner[0].b + g.last;
    }
    """
    inner = np.dtype([("a", "f8"), ("b", "i2")], align=True)
    given = np.dtype([("out", "u8"), ("n", "i8"), ("inner", inner, 2), ("last", "u1")], align=True)
    out = np.zeros(32, np.float32)
    value = np.array([(out.ctypes.data, 30, [(0, 3), (2.5, 0)], 200)], given)
    kernel = emulator.Module(text, mode="plain").get_function("kernel")
    assert kernel.argument_sizes == [given.itemsize] == [56]
    kernel((1,), (32,), (value,))
    assert (out[:30] == 207.5).all() and (out[30:] == 0).all()
    out[:] = 0
    kernel((1,), (32,), (np.frombuffer(value.tobytes(), np.dtype((np.void, 56))),))  # bytes without names
    assert (out[:30] == 207.5).all()


def test_numbers_and_pointers_are_passed_as_cupy_does():
    class Memory:
        def __init__(self, array: np.ndarray):
            self.ptr = array.ctypes.data

    class Array:
        def __init__(self, array: np.ndarray):
            self.data = Memory(array)

    parameters = "double *out, float *x, long long i, double f, bool b, int n, float g"
    out, x = np.zeros(1), np.full(1, 3, np.float32)
    kernel = function("*out = i + f + *x + (b ? 1000 : 0) + n + g;", parameters)
    kernel((1,), (1,), (Memory(out), Array(x), 2**40, 0.5, True, np.int32(-7), np.float32(0.25)))
    assert out[0] == 3 + 2**40 + 0.5 + 1000 - 7 + 0.25


def test_arguments_that_do_not_fit():
    kernel = function("out[0] = n;", "float *out, int n")
    out = np.zeros(1, np.float32)
    with pytest.raises(RuntimeError, match=r"kernel: got arguments of \[8, 8\] bytes; the kernel takes \[8, 4\]"):
        kernel((1,), (1,), (pointer(out), 5))
    with pytest.raises(RuntimeError, match=r"\[8\] bytes"):
        kernel((1,), (1,), (pointer(out),))
    with pytest.raises(TypeError, match="argument 0 is an array of size 3"):
        kernel((1,), (1,), (np.zeros(3), np.int32(1)))
    with pytest.raises(TypeError, match="argument 1 has the unsupported type str"):
        kernel((1,), (1,), (pointer(out), "5"))


def test_a_kernel_that_does_not_exist():
    module = emulator.Module('extern "C" __global__ void one() {}\n__global__ void two() {}', mode="plain")
    with pytest.raises(RuntimeError, match="there is no kernel three; there are one, two"):
        module.get_function("three")
    with pytest.raises(ValueError, match="no __global__ function"):
        emulator.Module("template <class T> __global__ void one() {}", mode="plain")


# ----------------------------------------------------------------------------------------------------------------------
# Limits of a launch


@pytest.mark.parametrize(
    ("grid", "block", "shared", "match"),
    [
        ((1,), (1025,), 0, r"block \(1025, 1, 1\)"),
        ((1,), (1024, 2), 0, "2048 threads in a block; it takes up to 1024"),
        ((1,), (1, 1, 65), 0, r"block \(1, 1, 65\)"),
        ((1,), (0,), 0, r"block \(0, 1, 1\)"),
        ((0,), (1,), 0, r"grid \(0, 1, 1\)"),
        ((2**31,), (1,), 0, "grid"),
        ((1, 65536), (1,), 0, r"grid \(1, 65536, 1\)"),
        ((1, 1, 65536), (1,), 0, r"grid \(1, 1, 65536\)"),
        ((1,), (1,), 49153, "49153 bytes of dynamic shared memory; its limit is 49152"),
    ],
)
def test_launches_that_a_gpu_refuses(grid, block, shared, match):
    kernel = function("out[0] = 1;")
    with pytest.raises(RuntimeError, match=f"^CUDA_ERROR_INVALID_VALUE: kernel: .*{match}"):
        kernel(grid, block, (np.uint64(0),), shared)


def test_launch_bounds():
    text = """
    #define N 32
    struct plan { static constexpr int threads = 2 * N; };
    extern "C" __global__ void __launch_bounds__(plan::threads, 2) a() {}
    extern "C" __launch_bounds__(N) __global__ void b() {}
    extern "C" __global__ __launch_bounds__((N)) void b2() {}
    """
    module = emulator.Module(text, mode="plain")
    for name, most in (("a", 64), ("b2", 32)):
        kernel = module.get_function(name)
        kernel((1,), (most,), ())
        with pytest.raises(RuntimeError, match=f"{most + 1} threads in a block; it takes up to {most}"):
            kernel((1,), (most + 1,), ())


def test_the_limit_of_shared_memory_counts_static_and_dynamic():
    kernel = function("__shared__ float x[10000]; x[threadIdx.x] = 1; out[threadIdx.x] = x[threadIdx.x];")
    out = np.zeros(32, np.float32)
    kernel((1,), (32,), (pointer(out),), 9152)
    with pytest.raises(RuntimeError, match="x: 49168 bytes of shared memory are in use, where 49152 are allowed"):
        kernel((1,), (32,), (pointer(out),), 9168)
    kernel.shared_limit = emulator.LARGEST_SHARED_LIMIT
    kernel((1,), (32,), (pointer(out),), 190000)
    kernel.shared_limit += 1
    with pytest.raises(RuntimeError, match="may be raised up to 232448"):
        kernel((1,), (32,), (pointer(out),), 9168)


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def test_a_deadlock_is_reported_with_all_that_wait():
    body = """if (blockIdx.x == 0) return;
    if (threadIdx.x < 32 || threadIdx.x == 40)
      __syncthreads();
    else
      __syncwarp();
    """
    fails(
        body,
        r"deadlock; no thread can go on: "
        r"33 threads wait at __syncthreads such as block \(1,0,0\) thread \(0,0,0\) at kernel\.cu:4; "
        r"31 threads wait at __syncwarp for the lanes 0x00000100 such as block \(1,0,0\) thread \(32,0,0\) "
        r"at kernel\.cu:6",
        grid=(2,),
        block=(64,),
    )


def test_messages_name_kernel_block_thread_and_line():
    fails(
        "\nif (blockIdx.y == 1 && threadIdx.x == 3)\n__trap();",
        r"^CUDA_ERROR_LAUNCH_FAILED: kernel: __trap in block \(0,1,0\) thread \(3,0,0\) at kernel\.cu:4$",
        grid=(1, 2),
    )


def test_declarations_of_shared_memory_keep_the_lines():
    fails("__shared__ int x[\n2],\ny;\nx[0] = y = 1;\n__trap();", r"__trap .* at kernel\.cu:6$")


def test_undefined_behaviour_is_an_error_with_a_line():
    fails("int i = 1 << (threadIdx.x + 30); out[0] = i;", r"shift .*kernel\.cu:2$")
    fails(
        "int i = 0x7ffffffe, j = threadIdx.x; out[0] = i + j;", r"signed integer overflow in an addition.*kernel\.cu:2$"
    )
    fails("int a[3] = {1, 2, 3}; out[0] = a[threadIdx.x];", r"index 3 is out of bounds of 'int \[3\]'")
    fails("out[0] = 5 / (int(threadIdx.x) - 4);", r"division by zero.*thread \(4,0,0\)")


def test_after_an_error_the_next_launch_works():
    kernel = function("if (fail) __trap(); __syncthreads(); out[threadIdx.x] = 1;", "float *out, long long fail")
    for order in ORDERS:
        out = np.zeros(64, np.float32)
        with pytest.raises(RuntimeError, match="__trap"):
            kernel((4,), (64,), (pointer(out), 1), order=order)
        assert (out == 0).all()
        kernel((4,), (64,), (pointer(out), 0), order=order)
        assert (out == 1).all()


def test_a_launch_leaves_no_memory_mapped():
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().split("\n"))

    kernel = function("if (fail) __trap();", "long long fail")
    kernel((1,), (1,), (0,))
    before = mappings()
    kernel((8,), (512,), (0,))
    with pytest.raises(RuntimeError):
        kernel((8,), (512,), (1,))
    assert mappings() < before + 20  # a stack and its guard are two


def test_a_fault_leaves_python_its_signal_handlers():
    program = f"""
import faulthandler, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
faulthandler.enable()
from emu import bugs
for bug in ("wild_pointer", "endless_recursion", "wild_pointer"):
    print(bugs.run("rows_in_turn", bug, 0))
faulthandler._sigsegv()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert re.search(r"illegal access.*\n.*stack overflow.*\n.*illegal access", done.stdout), done.stdout
    assert "Fatal Python error: Segmentation fault" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Headers and compiling


def test_headers_keep_their_names_and_lines(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "outer.h").write_text(
        '#pragma once\n#include "deep/inner.h"\n#ifdef __CUDACC__\n'
        "static __device__ void outer() {\n  __shared__ int x[\n  2], y;\n  x[0] = y = 1;\n  inner();\n}\n#endif\n"
    )
    (tmp_path / "deep" / "inner.h").write_text(
        '#pragma once\n#include "../outer.h"\n#include "../ptx.h"\nstatic __device__ void inner() {\n\n  __trap();\n}\n'
    )
    (tmp_path / "ptx.h").write_text("#error this file must be replaced\n")
    text = '#include "outer.h"\n#include "outer.h"\nextern "C" __global__ void kernel() {\n  outer();\n}\n'
    kernel = emulator.Module(text, [tmp_path], mode="plain").get_function("kernel")
    with pytest.raises(RuntimeError, match=rf"{tmp_path}/deep/inner\.h:6$"):
        kernel((1,), (1,), ())
    expanded = emulator.preprocess(text, [tmp_path], [], "kernel.cu")
    assert f'"{emulator.HERE / "ptx.h"}"' in expanded
    (tmp_path / "outer.h").write_text(
        '#pragma once\n#include "deep/inner.h"\nstatic __device__ void outer() { __syncthreads(); }\n'
    )
    emulator.Module(text, [tmp_path], mode="plain").get_function("kernel")((1,), (1,), ())  # compiled anew


def test_defines_and_macros():
    text = """
    #if !defined(__CUDACC__) || __CUDA_ARCH__ != 900
    #error a kernel must see these
    #endif
    #define KERNEL(name) extern "C" __global__ void name(float *out) { __shared__ float x; x = VALUE; *out = x; }
    #ifdef NEVER
    extern "C" __global__ void missing(float *out);
    #endif
    // extern "C" __global__ void comment() { __shared__ nothing; }
    KERNEL(kernel)
    """
    out = np.zeros(1, np.float32)
    module = emulator.Module(text, mode="plain", defines=["VALUE=3"])
    module.get_function("kernel")((1,), (1,), (pointer(out),))
    assert out[0] == 3
    with pytest.raises(RuntimeError, match=r"there are kernel$"):
        module.get_function("missing")


def test_kernels_see_no_more_names_than_nvrtc_gives_them():
    text = """
    struct float16 { unsigned short bits; };
    struct bfloat16 { unsigned short bits; };
    template <class T, int W> struct Vec { T v[W]; };
    template <class Real> __device__ Real exp(Real x) { return x; }
    template <class T> __device__ T select(T a) { return a; }
    typedef long long index_t;
    typedef unsigned int uint32_t;
    struct vector {}; struct map {}; struct string {}; struct Thread {}; struct Block {}; struct Site {};
    __device__ int read(int x) { return x; }
    __device__ double launch(double x) { return exp(x); }
    extern "C" __global__ void kernel(double *out) {
      out[0] = read(2) + launch(0) + exp(0.0f) + exp(Vec<int, 1>{5}).v[0];
    }
    """
    out = np.zeros(1)
    emulator.Module(text, mode="plain").get_function("kernel")((1,), (1,), (pointer(out),))
    assert out[0] == 2 + 1 + 1 + 5
    with pytest.raises(RuntimeError, match=r"stdint\.h"):
        emulator.Module('#include <stdint.h>\nextern "C" __global__ void kernel() {}', mode="plain")


def test_an_error_of_the_compiler_is_shown():
    with pytest.raises(RuntimeError, match=r"kernel\.cu:3:\d+: error: .*nonsense"):
        emulator.Module('extern "C" __global__ void kernel() {\n\n  nonsense();\n}', mode="plain")


def test_what_was_compiled_is_found_again(monkeypatch):
    text = 'extern "C" __global__ void kernel() {}'
    first = emulator.Module(text, mode="plain").path

    def no_compiler(unit, *_):
        raise AssertionError("compiled again")

    real = emulator._run
    monkeypatch.setattr(emulator, "_run", lambda c, *rest: real(c, *rest) if "-E" in c else no_compiler(c))
    assert emulator.Module(text, mode="plain").path == first
    with pytest.raises(AssertionError, match="compiled again"):
        emulator.Module(text + " ", mode="plain", flags=["-DX"])


# ----------------------------------------------------------------------------------------------------------------------
# The instructions of ptx.h


def test_the_emulation_has_all_that_ptx_h_has():
    real = (source.cuda_dir() / "ptx.h").read_text()
    names = set(re.findall(r"^SRU_PTX [\w ]+?[ *](\w+)\(", real, re.MULTILINE))
    assert "exp2_approx" in names and "float_to_half" in names
    types = set(re.findall(r"^SRU_(LOAD|STORE)_ONCE(?:_\d)?\((\w[\w ]*),", real, re.MULTILINE))
    templates = set(re.findall(r"^template <int \w+>\nSRU_PTX void (\w+)\(", real, re.MULTILINE))
    lines = [f"(void)&{name}{'<1>' if name in templates else ''};" for name in sorted(names)]
    for kind, of in sorted(types):
        lines.append(f"{{ {of} *p = ({of} *)out; " + ("load_once(p); }" if kind == "LOAD" else "store_once(p, *p); }"))
    text = '#include "ptx.h"\nextern "C" __global__ void kernel(void *out) {\n' + "\n".join(lines) + "\n}\n"
    module = emulator.Module(text, [source.cuda_dir()], mode="plain")
    module.get_function("kernel")((1,), (1,), (pointer(np.zeros(64)),))


# Rows and columns at which a lane of a warp has its numbers of A (16, 16), B (16, 8) and C (16, 8), with g = lane / 4
# and m = lane % 4: the fragments of mma.m16n8k16 in the words of the PTX ISA.
FRAGMENTS: dict[str, Callable[[Any, Any], list[tuple[Any, Any]]]] = {
    "a": lambda g, m: [(g + 8 * (i in (2, 3, 6, 7)), 2 * m + (i & 1) + 8 * (i >= 4)) for i in range(8)],
    "b": lambda g, m: [(2 * m + (i & 1) + 8 * (i >= 2), g) for i in range(4)],
    "c": lambda g, m: [(g + 8 * (i >= 2), 2 * m + (i & 1)) for i in range(4)],
}


def of_lanes(kind: str, matrix: np.ndarray) -> np.ndarray:
    """(32, numbers of a lane)."""
    lane = np.arange(32)
    return np.stack([matrix[at] for at in FRAGMENTS[kind](lane // 4, lane % 4)], 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name, dtype", [("multiply_add_halves", np.float16), ("multiply_add_bfloats", bfloat16)])
def test_products_of_a_warp(name, dtype, order):
    """By the documented layout alone: what hardware does is not seen here."""
    rng = np.random.default_rng(order)
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    text = f"""#include "ptx.h"
extern "C" __global__ void kernel(float *c, const unsigned int *a, const unsigned int *b) {{
  {name}(c + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}}
"""
    kernel = emulator.Module(text, [source.cuda_dir()], mode="plain").get_function("kernel")
    for warps in (1, 3):
        matrices = {"c": c, "a": a.astype(dtype), "b": b.astype(dtype)}
        given = {kind: np.tile(of_lanes(kind, matrix), (warps, 1)) for kind, matrix in matrices.items()}
        kernel((1,), (32 * warps,), tuple(map(pointer, given.values())), order=order)
        np.testing.assert_array_equal(given["c"], np.tile(of_lanes("c", a @ b + c), (warps, 1)))


def test_a_lane_that_stays_away_from_a_product_is_found():
    text = """#include "ptx.h"
extern "C" __global__ void kernel(float *out) {
  float sum[4] = {};
  const unsigned int a[4] = {}, b[2] = {};
  if (threadIdx.x != 5) multiply_add_halves(sum, a, b);
  out[threadIdx.x] = sum[0];
}
"""
    kernel = emulator.Module(text, [source.cuda_dir()], mode="plain").get_function("kernel")
    with pytest.raises(RuntimeError, match="lane 5"):
        kernel((1,), (32,), (pointer(np.zeros(32, np.float32)),))


def test_a_barrier_at_several_lines():
    """`meet` takes threads wherever they wait, unlike __syncthreads."""
    text = """#include "ptx.h"
extern "C" __global__ void kernel(int *out) {
  __shared__ int mine[64];
  mine[threadIdx.x] = threadIdx.x;
  if (threadIdx.x % 2)
    meet();
  else
    meet();
  out[threadIdx.x] = mine[63 - threadIdx.x];
}
"""
    kernel = emulator.Module(text, [source.cuda_dir()], mode="plain").get_function("kernel")
    for order in ORDERS:
        out = np.zeros(64, np.int32)
        kernel((1,), (64,), (pointer(out),), order=order)
        assert out.tolist() == [*range(63, -1, -1)]


def converted(expression: str, x: np.ndarray, kind: str, to: str, to_dtype: str) -> np.ndarray:
    out = np.zeros(len(x), to_dtype)
    text = f"""
    #include "ptx.h"
    extern "C" __global__ void kernel(const {kind} *x, {to} *out, long long n) {{
      for (long long i = threadIdx.x; i < n; i += 32) out[i] = {expression};
    }}
    """
    module = emulator.Module(text, mode="plain")
    module.get_function("kernel")((1,), (32,), (pointer(x), pointer(out), len(x)))
    return out


def test_half_to_float():
    x = np.arange(65536, dtype=np.uint16)
    y = converted("half_to_float(x[i])", x, "unsigned short", "float", "float32")
    np.testing.assert_array_equal(y, x.view(np.float16).astype(np.float32))


def awkward_floats() -> np.ndarray:
    """All halves, the middles between them, and their neighbours on both sides; and bit patterns at random."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
    halves[-1] = 65536.0
    exact = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2]).astype(np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    return np.concatenate([near, -near, bits.view(np.float32)])


def test_float_to_half():
    x = awkward_floats()
    y = converted("float_to_half(x[i])", x, "float", "unsigned short", "uint16")
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(y, np.where(np.isnan(x), 0x7FFF, expected))
    pairs = converted("floats_to_halves(x[i], x[n - 1 - i])", x, "float", "unsigned", "uint32")
    np.testing.assert_array_equal(pairs, y.astype(np.uint32) | y[::-1].astype(np.uint32) << 16)


def test_float_to_bfloat():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = awkward_floats()
    x = np.concatenate([x, (x.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)])  # the middles
    y = converted("float_to_bfloat(x[i])", x, "float", "unsigned short", "uint16")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(y, np.where(np.isnan(x), 0x7FFF, expected))
    pairs = converted("floats_to_bfloats(x[i], x[n - 1 - i])", x, "float", "unsigned", "uint32")
    np.testing.assert_array_equal(pairs, y.astype(np.uint32) | y[::-1].astype(np.uint32) << 16)
    back = converted("bfloat_to_float(x[i])", y, "unsigned short", "float", "float32")
    np.testing.assert_array_equal(back.view(np.uint32), y.astype(np.uint32) << 16)


def test_approximate_instructions_take_subnormals_for_zeros():
    tiny, inf = np.finfo(np.float32).smallest_normal, np.inf
    x = np.array([0, -0.0, 1.5, -126, -126.5, -200, 128, tiny / 2, inf, -inf, np.nan], np.float32)
    y = converted("exp2_approx(x[i])", x, "float", "float", "float32")
    np.testing.assert_array_equal(y, np.float32([1, 1, 2**1.5, tiny, 0, 0, inf, 1, inf, 0, np.nan]))
    x = np.array([4, -0.5, 0, -0.0, tiny / 2, -tiny / 2, 2.0**126.0, 2.0**127, inf, -inf, np.nan], np.float32)
    y = converted("reciprocal_approx(x[i])", x, "float", "float", "float32")
    expected = np.float32([0.25, -2, inf, -inf, inf, -inf, tiny, 0, 0, -0.0, np.nan])
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[:-1]), np.signbit(expected[:-1]))


# ----------------------------------------------------------------------------------------------------------------------
# Processes for the sanitizers


def test_run_sanitized_passes_the_status_on():
    if reason := emulator.preload("asan")[1]:
        pytest.skip(reason)
    program = "import os, sys; print(os.environ['SRU_RT_EMU_MODE']); sys.exit(3)"
    assert emulator.run_sanitized(["-c", program], "asan") == (3, "asan\n")
