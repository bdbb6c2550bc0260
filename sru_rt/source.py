"""Finds the C++ sources and makes compile units of them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CompileError

if TYPE_CHECKING:
    from .plan import Plan
    from .variant import Variant

CPP_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}


@cache
def cuda_dir() -> Path:
    """The folder of the C++ sources: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "cuda", here.parent / "cuda"):
        if (folder / "port.h").is_file():  # other packages install folders of this name
            return folder
    raise CompileError(
        f"sru_rt: the C++ sources were not found beside {here}; the installation is damaged: reinstall it"
    )


@cache
def digest() -> str:
    """A hash of all shared sources, part of the key of everything compiled from them."""
    state = hashlib.sha256()
    for path in sorted(cuda_dir().iterdir()):
        if path.is_file():
            content = path.read_bytes()
            state.update(f"{path.name} {len(content)}\n".encode() + content)
    return state.hexdigest()


def cpu_kernel(cell_text: str, struct_name: str, dtype: str, saved_dtype: str, wide: int) -> str:
    """The compile unit of one cell for given types; see SRU_CPU_KERNEL in cpu_sweep.h."""
    return (
        f'#include "cpu_sweep.h"\n{cell_text}\n'
        f"SRU_CPU_KERNEL({struct_name}, {CPP_TYPES[dtype]}, {CPP_TYPES[saved_dtype]}, {wide}u)\n"
    )


def gpu_kernel(cell_text: str, struct_name: str, variant: Variant, plan: Plan, struct_bytes: int) -> str:
    """The compile unit of one pass of a cell under a plan; see the end of the header that it includes."""
    types = f"{struct_name}, {CPP_TYPES[variant.dtype]}, {CPP_TYPES[variant.saved_dtype]}, {variant.wide}u"
    strides = " : ".join([*(f"i == {i} ? {n}" for i, n in enumerate(plan.input_strides)), "0"])
    flags = "has_mask has_reset wants_gates scratch_in_shared parallel shoots".split()
    flags += "reduce_reads_state saved_in_chunks".split()
    numbers = (
        "width depth replay_depth reduce_depth warm_up threads keep tile_bytes staged known laps copied line".split()
    )
    ways = {"decode": plan.decodes, "small": plan.is_small, "shoot": plan.shoots}
    ways |= {"lookahead": plan.lookahead, "scan": plan.parallel, "pair": plan.paired, "stage": plan.staged > 0}
    ways["ring"] = plan.laps > 0
    way = next((way for way, taken in ways.items() if taken), "")
    entry = "_".join(filter(None, ("FORWARD" if plan.forward else "BACKWARD", way.upper())))
    return f"""#include "gpu_{way or "sweep"}.h"
{cell_text}
struct plan {{
  static constexpr int {", ".join(f"{name} = {getattr(plan, name)}" for name in numbers)};
  static constexpr index_t B = {plan.B}, D = {plan.D}, d = {plan.d}, d_in = {plan.d_in};
  static constexpr index_t gate_stride = {plan.gate_stride};
  static constexpr bool {", ".join(f"{name} = {str(getattr(plan, name)).lower()}" for name in flags)};
  static constexpr unsigned wants_inputs = {plan.wants_inputs}u, in_tile = {plan.in_tile}u, narrow = {variant.narrow}u;
  SRU_FN constexpr index_t input_stride(int i) {{ return {strides}; }}
}};
SRU_GPU_{entry}({types}, plan, {struct_bytes})
"""


def pool() -> str:
    """The compile unit of the thread pool."""
    return '#include "pool.cpp"\n'


def turn() -> str:
    """The compile unit that turns matrices."""
    return '#include "turn.cpp"\n'


def xla() -> str:
    """The compile unit of the handler that XLA calls on the CPU."""
    return '#include "xla.cpp"\n'
