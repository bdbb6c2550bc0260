"""The mathematics and the conversions of port.h against NumPy, for every kind of vector register that this machine has.

Bounds are in units in the last place (ulp) of the exact result, measured against NumPy's longdouble.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import shares
from matrix import matrix
from sru_rt import compile_cpu

UNIT = (Path(__file__).parent / "cpp" / "port_math.cpp").read_text()
X86 = platform.machine() in ("x86_64", "AMD64")
CPUINFO = Path("/proc/cpuinfo")

# Flags, features that the processor must have, bytes of a vector register (None: whatever it is).
TARGETS = {
    "native": ("", (), None),
    "avx2": ("-march=haswell", ("avx2", "fma", "bmi2"), 32),
    "sse2": ("-march=x86-64", (), 16),
}


@pytest.fixture(scope="module", params=matrix(TARGETS))
def port(request):
    """The functions of port_math.cpp, compiled for one kind of processor."""
    flags, features, vector_bytes = TARGETS[request.param]
    if flags and not X86:
        pytest.skip(f"{request.param} is a kind of x86-64, and this is {platform.machine()}")
    if features:
        known = set(re.findall(r"\w+", CPUINFO.read_text())) if CPUINFO.exists() else set()
        if not known.issuperset(features):
            pytest.skip(f"{CPUINFO} does not name {', '.join(set(features) - known)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRU_RT_CXXFLAGS", f"{os.environ.get('SRU_RT_CXXFLAGS', '')} {flags}")
        library = compile_cpu.load(UNIT)
    assert vector_bytes in (None, library.vector_bytes())
    return library


def call(port: ctypes.CDLL, name: str, *arrays: np.ndarray, out: type | np.dtype | None = None) -> np.ndarray:
    """Runs a function of port_math.cpp; the result begins as NaN."""
    arrays = tuple(np.ascontiguousarray(a) for a in arrays)
    result = np.empty(arrays[0].size, out or arrays[0].dtype)
    result.view(np.uint8)[...] = 0xFF
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, result)]
    getattr(port, name)(*pointers, ctypes.c_longlong(result.size))
    return result


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, np.zeros_like(x))


EXACT = {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": softplus,
    "relu": lambda x: np.maximum(x, 0),
}

# Measured maxima: exp 1.0, log 0.9, tanh 1.4, sigmoid 2.3 (float64), softplus 2.8; sqrt and relu are exact.
ULP = {"exp": 1.5, "log": 1.5, "sqrt": 0.5, "tanh": 2.0, "sigmoid": 3.0, "softplus": 3.5, "relu": 0.0}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074}
# Where exp() leaves the numbers of the dtype.
EXP_ZERO = {"float32": -103.9721, "float64": -745.1332}
EXP_INFINITY = {"float32": 88.72284, "float64": 709.78271}


@functools.cache
def samples(name: str, dtype: str) -> np.ndarray:
    """Arguments whose results are finite: common ones, all magnitudes, and the borders of the dtype."""
    rng = np.random.default_rng(0)
    high, low = EXP_INFINITY[dtype], EXP_ZERO[dtype]
    x = [rng.uniform(-r, r, 40_000) for r in (1, 20)]
    x += [rng.uniform(low, high, 40_000), rng.uniform(low, low + 20, 10_000), rng.uniform(high - 1, high, 10_000)]
    exponents = rng.uniform(np.log2(SMALLEST[dtype]), 3, 40_000)
    x.append(rng.choice([-1.0, 1.0], 40_000) * np.exp2(exponents))
    if name in ("log", "sqrt", "relu"):
        top = np.log2(np.finfo(dtype).max) * (1 - 1e-7)
        x.append(np.exp2(rng.uniform(np.log2(SMALLEST[dtype]), top, 40_000)))
        x.append(1 + np.exp2(rng.uniform(-22, -1, 10_000)))
    x = np.concatenate(x).astype(dtype)
    return np.abs(x) if name in ("log", "sqrt") else x


@functools.cache
def exact(name: str, dtype: str) -> np.ndarray:
    return EXACT[name](samples(name, dtype).astype(np.longdouble))


def ulps(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Distance from the exact result in units of its last place, which does not shrink below the normal numbers."""
    unit = np.spacing(np.abs(wanted).astype(got.dtype)).astype(np.longdouble)
    return np.abs(got.astype(np.longdouble) - wanted) / unit


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXACT)
def test_function_is_accurate(port, name, dtype):
    x, wanted = samples(name, dtype), exact(name, dtype)
    got = call(port, f"{name}_{dtype}", x)
    assert np.isfinite(got).all()
    if name == "sigmoid":
        assert np.abs(got - wanted).max() < {"float32": 1.25e-7, "float64": 2.5e-16}[dtype]
    if name in ("sigmoid", "softplus"):  # their left tails end where results are no normal numbers
        normal = x > {"float32": -87, "float64": -708}[dtype]
        assert (got[~normal] <= np.exp(np.longdouble({"float32": -86.9, "float64": -707.9}[dtype]))).all()
        x, wanted, got = x[normal], wanted[normal], got[normal]
    # In float32 these round x*log2(e), of which log2(e) is rounded too; the left tail magnifies both by |x|.
    bound = ULP[name] + (1.25 * np.maximum(-x, 0) if dtype == "float32" and name in ("sigmoid", "softplus") else 0)
    error = ulps(got, wanted)
    worst = np.argmax(error - bound)
    assert error[worst] <= np.broadcast_to(bound, x.shape)[worst], f"{name}({x[worst]!r}) = {got[worst]!r}"


def nan_of(dtype: str, payload: int, sign: int) -> np.ndarray:
    bits, mantissa = (32, 23) if dtype == "float32" else (64, 52)
    pattern = (sign << (bits - 1)) | (((1 << (bits - 1 - mantissa)) - 1) << mantissa) | payload
    return np.array([pattern], f"uint{bits}").view(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_stays_nan(port, dtype):
    top = 1 << (22 if dtype == "float32" else 51)
    x = np.concatenate([nan_of(dtype, p, s) for p in (1, top, top | 1, 2 * top - 1, top - 1) for s in (0, 1)])
    assert np.isnan(x).all()
    for name in EXACT:
        assert np.isnan(call(port, f"{name}_{dtype}", x)).all(), name
    for name in ("minimum", "maximum"):
        for other in (0.0, -1.0, np.inf, -np.inf, np.nan):
            y = np.full_like(x, other)
            assert np.isnan(call(port, f"{name}_{dtype}", x, y)).all(), (name, other)
            assert np.isnan(call(port, f"{name}_{dtype}", y, x)).all(), (name, other)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(port, dtype):
    inf, nan, least = np.inf, np.nan, SMALLEST[dtype]
    largest, normal = float(np.finfo(dtype).max), float(np.finfo(dtype).tiny)
    ln2 = float(np.log(np.longdouble(2)))
    table = {
        "exp": [(0, 1), (-0.0, 1), (inf, inf), (-inf, 0), (least, 1), (largest, inf), (-largest, 0)],
        "log": [(0, -inf), (-0.0, -inf), (1, 0), (inf, inf), (-inf, nan), (-least, nan), (-largest, nan)],
        "sqrt": [(0, 0), (-0.0, -0.0), (4, 2), (inf, inf), (-inf, nan), (-least, nan)],
        "tanh": [(0, 0), (inf, 1), (-inf, -1), (least, least), (-least, -least), (normal, normal), (-largest, -1)],
        "sigmoid": [(0, 0.5), (-0.0, 0.5), (inf, 1), (least, 0.5), (largest, 1)],
        "softplus": [(0, ln2), (-0.0, ln2), (inf, inf), (-inf, 0), (least, ln2), (largest, largest), (-largest, 0)],
        "relu": [(0, 0), (inf, inf), (-inf, 0), (least, least), (-least, 0), (largest, largest), (-largest, 0)],
    }
    for name, cases in table.items():
        x, wanted = np.array(cases, dtype).T
        got = call(port, f"{name}_{dtype}", x)
        inexact = name in ("sigmoid", "softplus")
        np.testing.assert_allclose(got, wanted, rtol=2 * np.finfo(dtype).eps if inexact else 0)
        assert (np.signbit(got) == np.signbit(wanted))[~np.isnan(wanted)].all(), name
    for name in ("tanh", "relu"):  # the sign of the zero is not promised
        assert call(port, f"{name}_{dtype}", np.array([-0.0], dtype)) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_at_its_borders(port, dtype):
    """Every result around overflow, around the smallest number and around the normal numbers."""
    for border in (EXP_INFINITY[dtype], EXP_ZERO[dtype], float(np.log(np.finfo(dtype).tiny))):
        x = (np.array(border, dtype) + np.arange(-2000, 2001) * np.spacing(np.array(abs(border), dtype))).astype(dtype)
        with np.errstate(over="ignore"):
            wanted = np.exp(x.astype(np.longdouble)).astype(dtype)
        got = call(port, f"exp_{dtype}", x)
        finite = np.isfinite(wanted) & np.isfinite(got)
        assert (np.isfinite(wanted) != np.isfinite(got)).sum() <= 2, "overflow at another argument"
        assert ulps(got[finite], wanted[finite].astype(np.longdouble)).max() <= 1.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saturation_is_monotone_and_within_range(port, dtype):
    steps = np.concatenate([np.arange(0, 1000, 0.25), 2.0 ** np.arange(10, 127), [np.inf]])
    x = np.concatenate([-steps[:0:-1], steps]).astype(dtype)
    results = {name: call(port, f"{name}_{dtype}", x) for name in ("exp", "tanh", "sigmoid", "softplus", "relu")}
    for name, y in results.items():
        with np.errstate(invalid="ignore"):  # inf - inf
            falls = np.diff(y) < -2 * np.spacing(np.abs(y[1:]))
        assert not falls.any(), f"{name} falls after {x[:-1][falls]}"
    digits = 24 if dtype == "float32" else 53
    full = x > digits * np.log(2) + 1
    tanh, sigmoid, softplus, exp = (results[name] for name in ("tanh", "sigmoid", "softplus", "exp"))
    assert (np.abs(tanh) <= 1).all() and (tanh[full] == 1).all() and (tanh == -tanh[::-1]).all()
    assert (sigmoid >= 0).all() and (sigmoid <= 1).all() and (sigmoid[full] == 1).all()
    # Its left tail ends in 0 or in the smallest normal number.
    assert (sigmoid[x < -800] <= 1.04 * np.finfo(dtype).tiny).all()
    assert (softplus >= np.maximum(x, 0)).all() and (softplus[full] == x[full]).all()
    assert (exp[x < EXP_ZERO[dtype]] == 0).all() and np.isinf(exp[x > EXP_INFINITY[dtype]]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_minimum_and_maximum(port, dtype):
    rng = np.random.default_rng(1)
    special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, SMALLEST[dtype], np.nan], dtype)
    a, b = (grid.ravel() for grid in np.meshgrid(special, special))
    a, b = np.append(a, rng.normal(size=999).astype(dtype)), np.append(b, rng.normal(size=999).astype(dtype))
    np.testing.assert_array_equal(call(port, f"minimum_{dtype}", a, b), np.minimum(a, b))
    np.testing.assert_array_equal(call(port, f"maximum_{dtype}", a, b), np.maximum(a, b))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softplus_share_is_accurate(port, dtype):
    """Its digits are right from 1 to 1e-6, and near 0 its value, wherever the two arguments are."""
    a, b = shares.samples(dtype, 20_000)
    got, wanted = call(port, f"softplus_share_{dtype}", a, b), shares.exact(a, b)
    error, eps = np.abs(got - wanted), np.finfo(dtype).eps
    # Measured maxima: 3.8e-7, 19 eps; 1.8e-16, 2.4 eps. In float32 arguments of exponentials are rounded, up to 18.
    assert error.max() < {"float32": 5e-7, "float64": 3e-16}[dtype]
    counts = wanted > 1e-6
    assert (error[counts] / wanted[counts]).max() < {"float32": 25, "float64": 4}[dtype] * eps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_limits_of_softplus_share(port, dtype):
    a, b, wanted = np.array(shares.LIMITS).T.astype(dtype)
    got = call(port, f"softplus_share_{dtype}", a, b)
    np.testing.assert_allclose(got, wanted, rtol=4 * np.finfo(dtype).eps, atol=64 * np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_result_does_not_depend_on_place(port, dtype):
    """Whole packs and the rest of a row round alike."""
    x = samples("exp", dtype)[:77].copy()
    for name in ("exp", "tanh", "sigmoid", "softplus"):
        whole = call(port, f"{name}_{dtype}", x)
        for n in range(1, 40):
            assert call(port, f"{name}_{dtype}", x[-n:]).tobytes() == whole[-n:].tobytes(), (name, n)


HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PATTERNS = np.arange(1 << 16).astype(np.uint16)


def widened(dtype: str) -> np.ndarray:
    """Every 16-bit pattern as float32, from its fields: independent of any library's conversion."""
    mantissa_bits, bias = (10, 15) if dtype == "float16" else (7, 127)
    exponent = (PATTERNS & 0x7FFF) >> mantissa_bits
    mantissa = (PATTERNS & ((1 << mantissa_bits) - 1)).astype(np.float64)
    scale = np.exp2(np.maximum(exponent, 1).astype(np.float64) - bias - mantissa_bits)
    value = (mantissa + (exponent > 0) * 2.0**mantissa_bits) * scale
    special = exponent == exponent.max()
    value[special] = np.where(mantissa[special] == 0, np.inf, np.nan)
    return np.where(PATTERNS >> 15, -value, value).astype(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_pattern_loads_exactly(port, dtype):
    got, wanted = call(port, f"load_{dtype}", PATTERNS, out=np.float32), widened(dtype)
    np.testing.assert_array_equal(got, wanted)
    assert (np.signbit(got) == (PATTERNS >> 15).astype(bool)).all(), "the sign of a zero, an infinity or a NaN is lost"


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_value_stores_as_itself(port, dtype):
    values = widened(dtype)
    number = ~np.isnan(values)
    got = call(port, f"store_{dtype}", values, out=np.uint16)
    np.testing.assert_array_equal(got[number], PATTERNS[number])
    assert np.isnan(got[~number].view(HALVES[dtype]).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_halfway_cases_go_to_the_even_neighbour(port, dtype):
    infinity = int(np.array([np.inf], HALVES[dtype]).view(np.uint16)[0])
    below = np.arange(infinity, dtype=np.uint16)  # all that are finite and not negative
    values = widened(dtype)[: infinity + 1].astype(np.float64)
    values[infinity] = 2 * values[infinity - 1] - values[infinity - 2]  # the next number if there were one
    halfway = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    assert (halfway == (values[:-1] + values[1:]) / 2).all(), "float32 holds them exactly"
    even = below + (below & 1)
    for x, wanted in (
        (halfway, even),
        (np.nextafter(halfway, np.float32(0)), below),
        (np.nextafter(halfway, np.float32(np.inf)), below + np.uint16(1)),
    ):
        np.testing.assert_array_equal(call(port, f"store_{dtype}", x, out=np.uint16), wanted)
        np.testing.assert_array_equal(call(port, f"store_{dtype}", -x, out=np.uint16), wanted | 0x8000)


@pytest.mark.parametrize("dtype", HALVES)
def test_random_values_round_to_nearest_even(port, dtype):
    rng = np.random.default_rng(2)
    patterns = rng.integers(0, 1 << 32, 300_000, dtype=np.uint32).view(np.float32)
    scaled = (rng.normal(size=300_000) * np.exp2(rng.uniform(-30, 17, 300_000))).astype(np.float32)
    ends = np.array([0, np.inf, 3.4028235e38, 2.0**-149, 2.0**-126, 65519.996, 65520, 65536, 2.0**-25], np.float32)
    x = np.concatenate([patterns, scaled, ends, -ends])
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore", under="ignore"):
        wanted = x.astype(HALVES[dtype]).view(np.uint16)
    np.testing.assert_array_equal(call(port, f"store_{dtype}", x, out=np.uint16), wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_nan_stores_as_a_nan(port, dtype):
    """Also one whose payload lies in the bits that are cut off, or overflows when it is rounded."""
    payloads = [1, 2, 0x1000, 0x1FFF, 0xFFFF, 0x10000, 0x400000, 0x400001, 0x7FFFFF, 0x7FFFFF ^ 0x400000]
    x = np.concatenate([nan_of("float32", p, s) for p in payloads for s in (0, 1)])
    got = call(port, f"store_{dtype}", x, out=np.uint16).view(HALVES[dtype]).astype(np.float32)
    assert np.isnan(got).all()
    assert (np.signbit(got) == np.signbit(x)).all()
