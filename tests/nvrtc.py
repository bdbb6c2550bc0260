"""NVRTC without a GPU: releases beside the one that CuPy finds, and what a kernel takes, from logs and machine code."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sru_rt import abi, compile_gpu
from sru_rt.cell import Cell
from sru_rt.traffic import ITEMSIZE

WHEELS = {12: "nvidia-cuda-nvrtc-cu12==12.9.*", 13: "nvidia-cuda-nvrtc==13.*"}


class Missing(Exception):
    """What is not installed, and the command that installs it."""


def _in_wheels(pattern: str) -> Iterator[Path]:
    """Files of NVIDIA's wheels, wherever Python looks for packages."""
    for folder in sys.path:
        yield from sorted(Path(folder or ".").glob(f"nvidia/{pattern}"))


# ----------------------------------------------------------------------------------------------------------------------
# A release of NVRTC, by ctypes


class Nvrtc:
    """The NVRTC of one of NVIDIA's wheels."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def compile(self, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        """Machine code and log, as compile_gpu.compile gives them."""
        contents, names = compile_gpu._headers()
        program = ctypes.c_void_p()
        n = len(names)
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program),
                text.encode(),
                b"sru_rt.cu",
                n,
                (ctypes.c_char_p * n)(*contents),
                (ctypes.c_char_p * n)(*names),
            )
        )
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), arguments)
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode()
            if failed:
                raise RuntimeError(f"NVRTC {self.version} failed with {failed}:\n{log}")
            return self._get(program, "CUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    @staticmethod
    def _check(result: int) -> None:
        if result:
            raise RuntimeError(f"NVRTC gives error {result}")


class _OfCupy:
    """The NVRTC that the library itself uses."""

    def __init__(self) -> None:
        self.version = tuple(compile_gpu.nvrtc().getVersion())

    compile = staticmethod(compile_gpu.compile)


@functools.cache
def release(major: int) -> Nvrtc | _OfCupy:
    """NVRTC 12 or 13: the library's own if it is that one, else that of NVIDIA's wheel. Raises Missing."""
    own = _OfCupy()
    if own.version[0] == major:
        return own
    for path in _in_wheels(f"*/lib/libnvrtc.so.{major}"):
        return Nvrtc(path)
    raise Missing(f"NVRTC {major} is not installed: `pip install '{WHEELS[major]}'`")


# ----------------------------------------------------------------------------------------------------------------------
# What a kernel takes


@dataclass(frozen=True)
class Resources:
    """Of one kernel, in registers of a thread and bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int  # static


def resources(log: str) -> dict[str, Resources]:
    """By the names of the kernels in a log."""
    found = {}
    for name, text in re.findall(r"Function properties for (\w+)(.*?Used[^\n]*)", log, re.DOTALL):
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        used = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        if not frame or not used:
            raise RuntimeError(f"NVRTC's log is not understood:\n{log}")
        stack, stores, loads = map(int, frame.groups())
        found[name] = Resources(int(used[1]), stack, stores, loads, int(shared[1]) if shared else 0)
    if not found:
        raise RuntimeError(f"NVRTC's log holds no kernel:\n{log}")
    return found


def disassemble(cubin: bytes) -> str:
    """The machine code of all kernels as text. Raises Missing."""
    tool = next((str(p) for p in _in_wheels("*/bin/nvdisasm")), None) or shutil.which("nvdisasm")
    if tool is None:
        raise Missing("nvdisasm is not installed: `pip install nvidia-cuda-nvdisasm`")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin + b"\0")  # some releases of CuPy leave out the last byte of the file
        file.flush()
        done = subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed: {done.stderr}")
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Loops in machine code


class Block:
    """Instructions that run one after another, and the blocks that may follow."""

    def __init__(self) -> None:
        self.instructions: list[str] = []
        self.next: list[Block] = []


def control_flow(text: str, kernel: str) -> list[Block]:
    """The blocks of one kernel in a disassembly, the first one first."""
    section = re.search(rf"^\.text\.{kernel}:\n(.*?)(?=^\s*\.section|\Z)", text, re.DOTALL | re.MULTILINE)
    if section is None:
        raise RuntimeError(f"there is no kernel {kernel} in this machine code")
    blocks, labels, jumps = [Block()], {}, []
    for line in section[1].splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            blocks.append(Block())
            labels[label[1]] = blocks[-1]
        operation = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if not operation:
            continue
        blocks[-1].instructions.append(operation[1])
        if re.search(r"\b(BRA|EXIT|RET|BREAK|JMP|BRX)\b", operation[1]):
            blocks.append(Block())
    for block, following in zip(blocks, [*blocks[1:], None]):
        last = block.instructions[-1] if block.instructions else ""
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", last)
        if target:
            jumps.append((block, target[1]))
        # A jump of all threads or, under a predicate or condition, of some.
        always = re.match(r"(BRA(\.U)?\s+`|EXIT|RET|JMP|BRX)", last)
        if following is not None and not always:
            block.next.append(following)
    for block, label_name in jumps:
        block.next.append(labels[label_name])
    return blocks


def innermost_loops(blocks: list[Block]) -> list[list[Block]]:
    """The natural loops that hold no other one."""
    reachable = _from(blocks[0])
    dominates = _dominators(blocks[0], reachable)
    loops: dict[Block, set[Block]] = {}
    before: dict[Block, list[Block]] = {block: [] for block in reachable}
    for block in reachable:
        for after in block.next:
            before[after].append(block)
    for block in reachable:
        for head in block.next:
            if dominates(head, block):
                body = loops.setdefault(head, {head})
                todo = [block]
                while todo:
                    member = todo.pop()
                    if member not in body:
                        body.add(member)
                        todo += before[member]
    inner = [body for head, body in loops.items() if not any(o != head and o in body for o in loops)]
    return [[block for block in blocks if block in body] for body in inner]


def _from(first: Block) -> list[Block]:
    """The blocks that can be reached, each before those that follow it, but for loops."""
    done: dict[Block, None] = {}
    stack = [(first, iter(first.next))]
    seen = {first}
    while stack:
        block, following = stack[-1]
        after = next((b for b in following if b not in seen), None)
        if after is None:
            stack.pop()
            done[block] = None
        else:
            seen.add(after)
            stack.append((after, iter(after.next)))
    return list(done)[::-1]


def _dominators(first: Block, blocks: list[Block]) -> Callable[[Block, Block], bool]:
    """Whether every way to the second block leads through the first one."""
    order = {block: i for i, block in enumerate(blocks)}
    before: dict[Block, list[Block]] = {block: [] for block in blocks}
    for block in blocks:
        for after in block.next:
            before[after].append(block)
    nearest = {first: first}  # dominator of each block, found by Cooper, Harvey and Kennedy's way

    def common(a: Block, b: Block) -> Block:
        while a is not b:
            if order[a] < order[b]:
                b = nearest[b]
            else:
                a = nearest[a]
        return a

    changed = True
    while changed:
        changed = False
        for block in blocks[1:]:
            new = functools.reduce(common, (b for b in before[block] if b in nearest))
            changed |= nearest.get(block) is not new
            nearest[block] = new

    def dominates(head: Block, block: Block) -> bool:
        while block is not head and block is not first:
            block = nearest[block]
        return block is head

    return dominates


@dataclass(frozen=True)
class Steady:
    """Instructions of the loops that a sweep spends its time in, for one channel and step."""

    instructions: float
    mufu: float  # on the special function unit, 16 a clock and multiprocessor
    loads: float  # from global memory, to registers or to shared memory
    stores: float
    moves: float
    load_bits: dict[str, float]  # loads by their width


_OPERATIONS = {"mufu": "MUFU", "loads": "LDG(STS)?", "stores": "STG", "moves": r"(MOV|IMAD\.MOV(\.U32)?)"}
_WIDTHS = {bits: rf"LDG\S*\.{of}\b\S*" for bits, of in (("8", "[US]8"), ("16", "[US]16"), ("64", "64"), ("128", "128"))}


def steady(text: str, kernel: str, sweeps: list[tuple[int, float, str]], channels: int) -> Steady:
    """Counts the loops that read ahead, each divided by the steps of its lap and by `channels`, times directions.

    `sweeps` has for each the steps of a lap, the loads of one step, and their instruction, by which a loop is known. Of
    two that read as much in a lap, the first is the one that writes to global memory.
    What is called from a loop, such as a division in float64, is not in it. A way past an instruction counts as if
    taken.
    """
    totals, missing = dict.fromkeys(("instructions", *_OPERATIONS, *_WIDTHS), 0.0), set(sweeps)
    for loop in innermost_loops(control_flow(text, kernel)):
        instructions = [operation for block in loop for operation in block.instructions if "NOP" not in operation]
        if any("LDG" in operation and "STRONG" in operation for operation in instructions):
            continue  # it waits for other blocks
        fitting = [sweep for sweep in sweeps if sweep[0] * sweep[1] == _count(instructions, sweep[2])]
        for sweep in fitting[:1] if _count(instructions, "STG") else fitting[-1:]:
            missing.discard(sweep)
            steps = sweep[0]
            totals["instructions"] += len(instructions) / steps / channels
            for name, pattern in (_OPERATIONS | _WIDTHS).items():
                totals[name] += _count(instructions, pattern) / steps / channels
    if missing:
        raise RuntimeError(f"{kernel} has no loop of {sorted(missing)} (steps of a lap, loads of a step)")
    rounded = {name: round(total, 3) for name, total in totals.items()}
    bits = {name: n for name in _WIDTHS if (n := rounded.pop(name))}
    if rest := round(rounded["loads"] - sum(bits.values()), 3):
        bits["32"] = rest
    return Steady(**rounded, load_bits=dict(sorted(bits.items(), key=lambda item: int(item[0]))))


def instructions(text: str, kernel: str) -> int:
    """All instructions of a kernel, whether they run or not."""
    blocks = control_flow(text, kernel)
    return sum("NOP" not in operation for block in blocks for operation in block.instructions)


def _count(instructions: list[str], name: str) -> int:
    return sum(re.match(rf"(@!?U?P\d+ +)?{name}\b", operation) is not None for operation in instructions)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments at made-up addresses, for planning


def arguments(
    cell: Cell,
    dtype: str,
    sizes: tuple[int, int, int, int],
    *,
    forward: bool = True,
    every: int = 0,
    mask: bool = False,
    reset: bool = False,
    need: tuple[str, ...] = ("gates", "inputs", "per_sequence", "params"),
    address: int = 1 << 20,
    chunk: int = 0,
    saved_chunk: int = 0,
    d_in: int = 0,
) -> Any:
    """What recurrence.py would hand to the waist for arrays of `sizes` (L, B, D, d) that all begin at `address`.

    With `d_in`, a kernel forms U.
    """
    L, B, D, d = sizes
    slots = {
        "gates": [abi.Slot(address + i * d * ITEMSIZE[dtype], len(cell.gates) * d) for i in range(len(cell.gates))],
        "inputs": [],
        "per_sequence": [abi.Slot(address, d) for _ in cell.per_sequence],
        "params": [abi.Slot(address, len(cell.params) * d) for _ in cell.params],
    }
    for array in cell.arrays:
        if array.kind == "inputs":
            n = len(array.members)
            slots["inputs"] += [abi.Slot(address + 8 * i * d, n * d) for i in range(n)]
    single = [address] * len(cell.state)
    given = abi.Given(
        L=L,
        B=B,
        D=D,
        d=d,
        every=every,
        lengths=0,
        mask=address * mask,
        reset=address * reset,
        c0=single,
        constants=[1.0] * len(cell.constants),
        chunk=chunk,
        carry=address if chunk else 0,
        **slots,
    )
    if forward:
        made = abi.Forward(given, h=address, c_last=single, saved=single if every else [0] * len(single))
        if not d_in:
            return made
        given = given._replace(gates=[abi.NOT_WANTED] * len(cell.gates))
        return made._replace(given=given, x=address, weight=address, d_in=d_in)
    wanted = {kind: of if kind in need else [abi.NOT_WANTED] * len(of) for kind, of in slots.items()}
    return abi.Backward(
        given,
        dh=address,
        dc_last=single,
        saved=single,
        states=single if every > 1 else [0] * len(single),
        partial=abi.Slot(address, d),
        dgates=wanted["gates"],
        dinputs=wanted["inputs"],
        dper_sequence=wanted["per_sequence"],
        dparams=wanted["params"],
        dc0=single,
        saved_chunk=saved_chunk,
    )
