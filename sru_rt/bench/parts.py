"""Which problems are measured: parts, each of which fits eight minutes, and in them groups that take turns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .problem import BACKWARD, BOTH, FORWARD, SAVE, SAVE_32, Problem, moved

Shape = tuple[int, ...]  # L, B, d and, if it is not 1, D
Limits = dict[Any, float]

SMALL, MIDDLE, LARGE = ON_CPU = (32, 32, 128), (128, 32, 512), (512, 16, 1024)
FIRST_GPU = (2048, 16, 1024)
ON_GPU = (FIRST_GPU, (512, 32, 512), (32, 32, 128), (65536, 1, 1024), (16384, 8, 2048))
DTYPES = {"cpu": ("float32",), "gpu": ("bfloat16", "float32")}
MOST = ("SRU", "QRNN fo", "QRNN ifo with highway", "minGRU", "minLSTM", "own cell")
QUICK = ("scan", "cells", "layers", "train", "decode")  # parts, of which the first shape is measured


class Part(NamedTuple):
    """Problems of one kind."""

    name: str
    about: str
    level: str
    cells: tuple[str, ...]
    cpu: tuple[Shape, ...]
    gpu: tuple[Shape, ...]
    layers: tuple[int, ...] = (1,)
    ragged: bool = False  # also with lengths of which half is padding

    def groups(self, device: str, dtypes: Sequence[str], shapes: Sequence[Shape]) -> Iterator[list[Problem]]:
        """Those of a group are measured in the same rounds: all cells of a shape on the CPU, one on a GPU."""
        for dtype in dtypes or DTYPES[device]:
            for shape in shapes or (self.cpu if device == "cpu" else self.gpu):
                kinds = [(False, n) for n in self.layers] + ([(True, 1)] if self.ragged else [])
                sizes = _sizes(shape)
                found = [[Problem(self.level, n, dtype, *sizes, *kind) for kind in kinds] for n in self.cells]
                yield from [list(itertools.chain(*found))] if device == "cpu" else found


def _sizes(shape: Shape) -> tuple[int, int, int, int]:
    L, B, d, D = (*shape, 1)[:4]
    return L, B, d, D


def _grid(lengths: Sequence[int], B: int, sizes: Sequence[int]) -> tuple[Shape, ...]:
    return tuple((L, B, d) for L in lengths for d in sizes)


PARTS = (
    Part("scan", "h = a*h + b alone, beside the scans of others", "scan", ("linear",), ON_CPU, ON_GPU),
    Part("cells", "the recurrence of every cell, given U, beside copies", "cell", MOST, ON_CPU, ON_GPU[:4]),
    Part("layers", "layers with their products", "layer", ("SRU", "minGRU positive"), ON_CPU, ON_GPU[:3]),
    Part("train", "a step of gradient descent of a layer", "train", ("SRU",), ON_CPU, ON_GPU[:3]),
    Part(
        "figures",
        "the shapes of figure 1 of the SRU paper",
        "layer",
        ("SRU",),
        (*_grid((32, 64, 128), 32, (256,)), *_grid((32,), 32, (128, 512))),
        _grid((32, 128, 512), 32, (128, 256, 512, 1024)),
    ),
    Part(
        "mingru",
        "the batch of 64 of figure 1 of the minGRU paper",
        "layer",
        ("minGRU positive",),
        _grid((64, 256, 1024), 64, (64,)),
        _grid((64, 256, 1024, 4096), 64, (64, 256)),
    ),
    Part(
        "batch",
        "a sweep of B*d, at lengths that move enough bytes",
        "cell",
        ("SRU", "minGRU"),
        tuple((512, B, 512) for B in (1, 4, 16, 32)),
        tuple((8192 if B < 16 else 4096 if B < 64 else 1024, B, 1024) for B in (1, 2, 4, 8, 16, 32, 64, 128)),
    ),
    Part(
        "time",
        "a sweep of L with a single sequence",
        "cell",
        ("SRU", "SRU without v", "minGRU"),
        tuple((L, 1, 1024) for L in (1024, 4096, 16384)),
        tuple((L, 1, 1024) for L in (1024, 4096, 16384, 65536, 262144)),
    ),
    Part("ragged", "lengths of which half is padding", "cell", ("SRU",), (MIDDLE,), (FIRST_GPU,), ragged=True),
    Part("directions", "two directions", "layer", ("SRU",), ((*MIDDLE, 2),), ((2048, 8, 512, 2), (512, 32, 256, 2))),
    Part(
        "decode",
        "one token",
        "layer",
        ("SRU", "minGRU positive"),
        _grid((1,), 1, (512, 1024)) + _grid((1,), 64, (512,)),
        tuple((1, B, 1024) for B in (1, 8, 64)),
        layers=(1, 6),
    ),
    Part("overhead", "next to nothing to compute: what a call costs", "cell", ("SRU",), ((2, 1, 4),), ((2, 1, 4),)),
)  # fmt: skip
BY_NAME = {part.name: part for part in PARTS}

# What the project aims at, see docs/performance.md; a row that is not named has no target.
_PRODUCTS = {FORWARD: 1.10, BOTH: 1.12}
_REFERENCE: Limits = {(MIDDLE, FORWARD): 1.5, (LARGE, FORWARD): 1.3, (MIDDLE, BOTH): 3.0, (LARGE, BOTH): 10.0}
_LSTM: Limits = {SMALL: 2.5, MIDDLE: 2.5, LARGE: 3.0}
ENOUGH_BYTES = 256e6  # from which on a pass on a GPU is held against a copy, and not against a time
_CHAIN_NS = {FORWARD: 31, BACKWARD: 15}  # the dependent instructions of one step of SRU, an estimate


def target(problem: Problem, who: str, which: str, device: str, threads: int, cache_bytes: int) -> float | None:
    """Of the comparison of a row: the least it should be, or the most where it is a multiple of our products."""
    shape = (problem.L, problem.B, problem.d)
    if problem.D > 1 or (problem.ragged and device == "cpu"):
        return None
    if device == "cpu":
        return _on_cpu(problem, who, which, shape, threads, cache_bytes)
    return _on_gpu(problem, who, which, shape)


def _on_cpu(problem: Problem, who: str, which: str, shape: Shape, threads: int, cache_bytes: int) -> float | None:
    if problem.level == "cell" and who == "sru_rt" and moved(problem, which) > cache_bytes:
        return 0.8 if threads == 1 else 0.7
    if problem.level == "cell" and who.startswith("lax."):
        return 3.0 if which == BOTH and shape == LARGE else None
    if problem.level != "layer" or problem.name != "SRU":
        return None
    if who in ("sru_rt", "sru_rt in PyTorch"):
        return _PRODUCTS.get(which) if shape in (MIDDLE, LARGE) else None
    if who == "sru":
        return _REFERENCE.get((shape, which))
    return _LSTM.get(shape) if who == "torch.nn.LSTM" and which in (FORWARD, BOTH) else None


def _on_gpu(problem: Problem, who: str, which: str, shape: Shape) -> float | None:
    if problem.ragged:
        return 1.8 if who == "sru_rt" else None
    if who == "sru_rt" and problem.level in ("scan", "cell"):
        if moved(problem, which) < ENOUGH_BYTES or not 8 << 10 <= problem.channels <= 128 << 10:
            return None
        return 0.8 if shape != FIRST_GPU else 0.9 if which in (FORWARD, SAVE, SAVE_32) else 0.85
    if problem.level == "cell" and who in ("naive kernel", "sru"):
        return 5.0 if shape == FIRST_GPU else 1.0
    if who == "torch.nn.LSTM" and problem.level == "layer" and which == BOTH and problem.B == 32:
        return 10.0 if problem.d <= 512 else 5.0 if problem.d == 1024 else None
    return None


_MOST_US = {
    ("cell", "SRU", "bfloat16", (65536, 1, 1024), FORWARD): 320.0,
    ("cell", "SRU without v", "bfloat16", (65536, 1, 1024), SAVE): 235.0,
    ("cell", "minGRU", "bfloat16", (65536, 1, 1024), FORWARD): 130.0,
    ("layer", "SRU", "bfloat16", FIRST_GPU, FORWARD): 305.0,
    ("layer", "SRU", "float32", SMALL, FORWARD): 8.0,
}


def most_us(problem: Problem, who: str, which: str, device: str, copy_rate: float | None) -> float | None:
    """The most microseconds that a row should take on a GPU; `copy_rate` is bytes a second."""
    if device == "cpu" or who != "sru_rt" or problem.D > 1 or problem.ragged:
        return None
    if problem.layers > 1:
        return 15.0 if problem[1:] == ("SRU", "bfloat16", 1, 1, 1024, 1, False, 6) else None
    named = _MOST_US.get((problem.level, problem.name, problem.dtype, (problem.L, problem.B, problem.d), which))
    if named or problem.level != "cell" or moved(problem, which) >= ENOUGH_BYTES or not copy_rate:
        return named
    chain = 1e-3 * problem.L * _CHAIN_NS[FORWARD if which in (FORWARD, SAVE, SAVE_32) else BACKWARD]
    return 1.15 * max(1e6 * moved(problem, which) / copy_rate, chain) + 3
