"""Derived gradients beside those of tests/hand_written/: the same numbers, for no more instructions."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sru_rt import compile_cpu
from sru_rt.cell import Cell
from sru_rt.cells import named_cells
from sru_rt.emit import emit
from test_emit import draw, run

TOOLS = Path(__file__).parent.parent / "tools"
TEXTS = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "hand_written").glob("*.cuh"))}
CELLS = {cell.name: cell for cell in named_cells()}

# Of one channel and step, without moves, which the compiler places as it likes; one or two of a lap may differ still.
INSTRUCTIONS, REGISTERS = 0.1, 2
RERECORD = "run `python tools/derived_gradients.py` and commit what it writes"


def test_every_kind_of_cell_has_a_hand_written_gradient():
    assert set(TEXTS) <= set(CELLS)
    assert {"sru", "sru_no_v", "qrnn", "qrnn_ifo", "qrnn_highway", "mingru", "mingru_positive", "minlstm"} <= set(TEXTS)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def parts(text: str) -> tuple[str, str]:
    """step() and gradient(), without comments."""
    code = re.sub(r"//[^\n]*\n", "\n", text)
    step, gradient = code[code.index("struct") :].split("SRU_FN void gradient")
    return re.sub(r"\s+", " ", step), re.sub(r"\s+", " ", gradient)


def outcome(cell: Cell, monkeypatch: pytest.MonkeyPatch, text: str, constants: tuple[float, ...]) -> dict[str, object]:
    """What the library computes in float64 from a text, of states and gates of both signs and saturated ones."""
    with monkeypatch.context() as patch:
        patch.setattr(compile_cpu, "emit", lambda _: text)
        same = Cell(cell.name, cell.step, cell.arrays, cell.constants)  # compiled anew, as kernels are kept by cell
        arrays = draw(cell, np.random.default_rng(0), 9, 4, 2, 37)
        arrays[cell.arrays[0].name] *= 8
        return run(same, arrays, "float64", constants)


@pytest.mark.parametrize("name", TEXTS)
def test_the_same_numbers(name, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    cell, text = CELLS[name], TEXTS[name]
    (step, gradient), (emitted_step, emitted_gradient) = parts(text), parts(emit(cell))
    assert step == emitted_step and gradient != emitted_gradient
    constants = tuple(1.5 for _ in cell.constants)
    derived = outcome(cell, monkeypatch, emit(cell), constants)
    by_hand = outcome(cell, monkeypatch, text, constants)
    assert set(derived) == set(by_hand) and len(derived) > 4
    for array, values in derived.items():
        assert np.abs(values).max() > 1e-3
        np.testing.assert_allclose(by_hand[array], values, rtol=1e-11, atol=1e-13, err_msg=f"{name}: {array}")


def test_a_wrong_gradient_is_seen(monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    wrong = TEXTS["sru"].replace("const real du0 = fma(-dc, f, dc)", "const real du0 = fma(-dc, f, -dc)")
    assert wrong != TEXTS["sru"]
    derived = outcome(CELLS["sru"], monkeypatch, emit(CELLS["sru"]), (1.5,))
    by_hand = outcome(CELLS["sru"], monkeypatch, wrong, (1.5,))
    assert np.abs(by_hand["du"] - derived["du"]).max() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Instructions


@pytest.fixture(scope="module")
def tool():
    """tools/derived_gradients.py."""
    pytest.importorskip("cupy", reason="CuPy, through which kernels for a GPU are compiled, is not installed")
    names = ("gpu_budget", "derived_gradients")
    for name in names:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    yield module
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def measured(tool):
    try:
        return tool.measured()
    except tool.nvrtc.Missing as error:
        pytest.fail(str(error))


@pytest.mark.slow
def test_no_more_instructions_and_registers(tool, measured):
    assert set(measured) == {f"{name}, {dtype}" for name in TEXTS for dtype in tool.DTYPES}
    faults = []
    for key, (derived, by_hand) in measured.items():
        if derived.instructions > by_hand.instructions + INSTRUCTIONS:
            faults.append(f"{key}: {derived.instructions} instructions, by hand {by_hand.instructions}")
        if derived.registers > by_hand.registers + REGISTERS:
            faults.append(f"{key}: {derived.registers} registers, by hand {by_hand.registers}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_record_is_what_is_measured(tool, measured):
    """Other builds of the same release may differ a little."""
    recorded = tool.recorded()
    assert set(recorded) == set(measured), RERECORD
    for key, pair in measured.items():
        for now, was in zip(pair, recorded[key]):
            near = abs(now.instructions - was.instructions) <= 0.05 * was.instructions
            assert near and abs(now.registers - was.registers) <= 4, f"{key}: was {was}, is {now}: {RERECORD}"


def test_table_is_that_of_the_record(tool):
    text = tool.gpu_budget.PAGE.read_text()
    assert tool.page(text, tool.recorded()) == text, "run `python tools/derived_gradients.py --table`, and commit it"


@pytest.mark.slow
def test_one_more_operation_is_seen(tool, measured):
    more = TEXTS["mingru"].replace("dgate[1] = dn;", "dgate[1] = dn * (n - h_prev);")
    assert more != TEXTS["mingru"]
    (_, by_hand) = measured["mingru, float32"]
    assert tool.count("mingru", "float32", more).instructions > by_hand.instructions + INSTRUCTIONS
