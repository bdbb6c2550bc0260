"""Streams, devices, memory and graphs: what a GPU adds to arithmetic.

Tests with the fixture `place` run under the emulation as well, where a launch ends before it returns and there are two
devices. The others need a GPU; on one without CuPy or a driver they are skipped, with the reason.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import sru_rt
from gpu_places import Place, Problem, Result, on_device, random_problem, run, same
from sru_rt import launch_gpu, on_cupy
from sru_rt.errors import SruRtError

needs_gpu = pytest.mark.parametrize("place", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)

SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


def a_problem(seed: int = 0, layer: bool = False) -> Problem:
    problem = random_problem("float32", 9, 3, 2, 33, seed=seed)
    if layer:
        u = problem.arrays.pop("u")
        problem.arrays["weight"] = np.random.default_rng(seed).normal(size=(2, 3, 33, 66)).astype(u.dtype) / 8
    return problem


def put(place: Place, problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    return place.put(problem.given), place.put(problem.seeds)


def overwrite(arrays: Mapping[str, Any], values: Mapping[str, np.ndarray], stream: Any) -> None:
    for name, value in values.items():
        arrays[name].set(value, stream=stream)


# ----------------------------------------------------------------------------------------------------------------------
# Streams


@needs_gpu
def test_the_device_is_one_that_the_planner_knows(place):
    facts = launch_gpu.device_facts(0)
    assert facts.arch >= 75 and 1 <= facts.multiprocessors <= 1024


@needs_gpu
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("save", [True, 4])
def test_a_graph_that_was_captured_takes_new_inputs(place, save, layer):
    """After a first call nothing in the forward or the backward keeps them from being captured."""
    cupy = place.xp
    problems = [a_problem(seed, layer) for seed in range(3)]
    wanted = [run(place, problem, save=save, layer=layer) for problem in problems]
    given, seeds = put(place, problems[0])
    cupy.cuda.Device().synchronize()  # the stream below does not wait for the default one
    stream = cupy.cuda.Stream(non_blocking=True)
    # What is freed in the capture belongs to the graph: nobody else may get it. So it has a pool of its own.
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        on_device(given, seeds, save=save, layer=layer)
        stream.synchronize()
        stream.begin_capture()
        results = on_device(given, seeds, save=save, layer=layer)
        graph = stream.end_capture()
    for problem, expected in list(zip(problems, wanted))[1:]:
        overwrite(given, problem.arrays, stream)
        overwrite(seeds, problem.seeds, stream)
        graph.launch(stream)
        stream.synchronize()
        same({"the call": expected, "the graph": Result(*place.get(results))})


@needs_gpu
@pytest.mark.parametrize("save", [True, 4])
def test_work_waits_for_its_stream_and_the_host_for_nothing(place, save):
    """The inputs are only written at the end of a long kernel; the calls return before it ends."""
    cupy = place.xp
    first, second = a_problem(1), a_problem(2)
    wanted = run(place, second, save=save)
    given, seeds = put(place, first)
    later, later_seeds = put(place, second)
    spin = cupy.RawKernel(SPIN, "spin")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        spin((1,), (1,), (np.int64(1),))
        on_device(given, seeds, save=save)  # takes the memory from the system that the next call takes from the pool
        stream.synchronize()
        spin((1,), (1,), (np.int64(1_000_000_000),))
        for to, source, names in ((given, later, second.arrays), (seeds, later_seeds, second.seeds)):
            for name in names:
                array = source[name]
                to[name].data.copy_from_device_async(array.data, array.nbytes)
        results = on_device(given, seeds, save=save)
        assert not stream.done, "a call has waited for the device"
        stream.synchronize()
    same({"alone": wanted, "in a stream": Result(*place.get(results))})


def test_two_threads_with_a_stream_each(place):
    problems = [a_problem(seed) for seed in range(2)]
    wanted = [run(place, problem) for problem in problems]
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def work(problem: Problem, expected: Result) -> None:
        try:
            with place.xp.cuda.Stream(non_blocking=True):
                start.wait()
                for _ in range(10):
                    same({"alone": expected, "with others": run(place, problem)})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(problems, wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_two_threads_compile_the_same_kernel(place):
    """Neither sees a kernel of the other that is not complete."""
    problem, results, start = random_problem("float64", 3, 2, 1, 5, seed=7), {}, threading.Barrier(2)

    def work(number: int) -> None:
        start.wait()
        results[number] = run(place, problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    same(results)


# ----------------------------------------------------------------------------------------------------------------------
# Devices


def current(place: Place) -> tuple[int, int]:
    return place.xp.cuda.runtime.getDevice(), place.xp.cuda.get_current_stream().ptr


def test_device_and_stream_are_left_as_they_were(place):
    problem = a_problem()
    with place.xp.cuda.Stream(non_blocking=True):
        before = current(place)
        run(place, problem)
        assert current(place) == before
        with pytest.raises(SruRtError):
            sru_rt.sru_recurrence(**place.put(problem.arrays), alpha="much")
        assert current(place) == before
    assert current(place) != before


def test_arrays_of_another_device(place):
    """A call runs where its arrays are, whichever device is the current one."""
    cupy = place.xp
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    problem = a_problem()
    wanted, before = run(place, problem), current(place)
    with cupy.cuda.Device(1):
        given, seeds = put(place, problem)
    h, c_last, gradients = on_device(given, seeds)
    assert current(place) == before
    assert {array.device.id for array in (h, c_last, *gradients.values())} == {1}
    with cupy.cuda.Device(1):
        same({"device 0": wanted, "device 1": Result(*place.get((h, c_last, gradients)))})


# ----------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("save", [True, 4, "x"])
def test_memory_that_runs_out_in_a_backward_leaves_all_usable(place, save, monkeypatch):
    problem = a_problem(layer=True)
    wanted = run(place, problem, save=save, layer=True)
    given, seeds = put(place, problem)
    h, c_last, saved = sru_rt.sru_forward(**given, save=save)
    empty = on_cupy.CuPy.empty
    for fatal in itertools.count():
        number = itertools.count()

        def failing(library: Any, *arguments: Any, number: Any = number, fatal: int = fatal) -> Any:
            if next(number) == fatal:
                raise MemoryError
            return empty(library, *arguments)

        monkeypatch.setattr(on_cupy.CuPy, "empty", failing)
        try:
            gradients = sru_rt.sru_backward(saved, **seeds)
            break
        except MemoryError:
            continue
    assert fatal >= 5, "as many arrays as the backward makes at least"
    monkeypatch.setattr(on_cupy.CuPy, "empty", empty)
    found = {name: getattr(gradients, name) for name in gradients}
    again = run(place, problem, save=save, layer=True)
    same({"before": wanted, "at last": Result(*place.get((h, c_last, found))), "afterwards": again})


@needs_gpu
@pytest.mark.parametrize("save", [True, 32])
def test_a_full_device_in_a_backward(place, save):
    """The same with memory that is truly limited."""
    cupy = place.xp
    problem = random_problem("float32", 128, 8, 1, 512)
    wanted = run(place, problem, save=save)
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        given, seeds = put(place, problem)
        h, c_last, saved = sru_rt.sru_recurrence(**given, save=save)
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + (1 << 20))  # the gradient of U takes 6 MiB
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            sru_rt.sru_backward(saved, **seeds)
        pool.set_limit(size=0)
        gradients = sru_rt.sru_backward(saved, **seeds)
        found = {name: getattr(gradients, name) for name in gradients}
        same({"before": wanted, "after": Result(*place.get((h, c_last, found)))})


# ----------------------------------------------------------------------------------------------------------------------
# Arrays of other libraries, which are served forward only


@needs_gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_torch(place, dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    problem = random_problem(dtype, 6, 3, 2, 33)
    wanted = run(place, problem)
    given = {name: torch.from_numpy(array).cuda() for name, array in problem.arrays.items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        h, c_last = sru_rt.sru_recurrence(**given, **problem.options)
        assert h.is_cuda and c_last.is_cuda
        got = Result(h.cpu().numpy(), c_last.cpu().numpy(), wanted.gradients)
    same({"CuPy": wanted, "PyTorch": got})


@needs_gpu
def test_jax(place, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other tests need memory, too
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX finds no GPU: {error}")
    problem = random_problem("float32", 6, 3, 2, 33)
    wanted = run(place, problem)
    given = {name: jax.device_put(array, device) for name, array in problem.arrays.items()}

    @jax.jit
    def both(given, seeds):
        results, pullback = jax.vjp(lambda given: sru_rt.sru_recurrence(**given, **problem.options), given)
        return results, pullback(seeds)[0]

    for _ in range(2):  # the second time as XLA has captured it
        (h, c_last), gradients = both(given, (problem.dh, problem.dlast))
    assert isinstance(h, jax.Array) and h.devices() == {device}
    gradients = {name: np.asarray(gradients[name]) for name in problem.arrays}
    same({"CuPy": wanted, "JAX": Result(np.asarray(h), np.asarray(c_last), gradients)})
