"""GPUs as the model of `predict` sees them: a few numbers each, from public data sheets or from what a driver tells.

None of these numbers was measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

# What is reached of a data sheet's numbers: of bandwidth by a copy, of the highest clock under load, of the rate of
# products by a large one. Assumptions; those of an H200 are then 4.3 TB/s, 1.74 GHz and 790 TFLOP/s.
_OF_BANDWIDTH, _OF_CLOCK, _OF_PRODUCTS = 0.9, 0.88, 0.8
_LATENCY = 0.8e-6  # seconds from a load to its value, with the memory busy
_LAUNCH = 1.5e-6  # seconds of a kernel in a graph or queue beside its work
# Of a multiprocessor: bytes a clock from the second-level cache, if all ask and if one does; special functions.
_CACHE_BYTES, _PORT_BYTES, _SPECIAL = 24, 64, 16
SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction of one warp a clock
REGISTERS = 1 << 16  # of a multiprocessor

# Threads and blocks of a multiprocessor, and KiB of shared memory (CUDA C++ Programming Guide, compute capabilities).
_LIMITS = {
    75: (1024, 16, 64),
    80: (2048, 32, 164),
    86: (1536, 16, 100),
    87: (1536, 16, 164),
    89: (1536, 24, 100),
    90: (2048, 32, 228),
    100: (2048, 32, 228),
    120: (1536, 24, 100),
}


@dataclass(frozen=True)
class Device:
    """What is asked of a GPU: its architecture, such as 90, and its number of multiprocessors.

    The rest is what its driver tells beside these, 0 if nothing was asked; no kernel depends on it.
    """

    arch: int
    multiprocessors: int
    bandwidth: float = 0  # of its memory, in bytes a second: clock, both edges, width of the bus
    clock: float = 0  # the highest, in Hz
    l2_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU; rates are those of data sheets, with dense products summed in float32."""

    name: str
    arch: int
    multiprocessors: int
    sheet_bandwidth: float  # bytes a second
    sheet_clock: float  # Hz
    l2_bytes: int
    products: tuple[float, float, float]  # operations a second of 16-bit data, of TF32, of float32; 0: not there
    latency: float = _LATENCY

    @property
    def device(self) -> Device:
        """What the driver of such a card would tell."""
        return Device(self.arch, self.multiprocessors, self.sheet_bandwidth, self.sheet_clock, self.l2_bytes)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        return _OF_BANDWIDTH * self.sheet_bandwidth

    @property
    def clock(self) -> float:
        """Clocks a second under load."""
        return _OF_CLOCK * self.sheet_clock

    @property
    def cache_bandwidth(self) -> float:
        """Bytes a second from the second-level cache."""
        return _CACHE_BYTES * self.multiprocessors * self.clock

    @property
    def port_bandwidth(self) -> float:
        """Bytes a second of one multiprocessor."""
        return _PORT_BYTES * self.clock

    @property
    def special_rate(self) -> float:
        """Special functions a second of one multiprocessor."""
        return _SPECIAL * self.clock

    @property
    def launch(self) -> float:
        return _LAUNCH

    @property
    def limits(self) -> tuple[int, int, int]:
        """Threads, blocks and bytes of shared memory of a multiprocessor."""
        threads, blocks, kib = _LIMITS[_nearest(self.arch, _LIMITS)]
        return threads, blocks, kib << 10

    def product_rate(self, dtype: str, tf32: bool = False) -> float:
        """Operations a second of a large product; of those in float64, of which nothing is known, half of float32."""
        half, tf, single = self.products
        rate = {"float32": tf if tf32 and tf else single, "float64": single / 2}.get(dtype, half)
        return _OF_PRODUCTS * rate


# From NVIDIA's data sheets and architecture white papers: H200 and H100 (SXM), A100 80 GB (SXM), L4, GeForce RTX 4090
# (Ada white paper), T4, B200 (HGX), RTX A6000, GeForce RTX 5090 (Blackwell white paper). The first card of an
# architecture is the usual one.
CARDS = (
    Machine("H200", 90, 132, 4.8e12, 1.98e9, 60 << 20, (989e12, 495e12, 67e12)),
    Machine("H100", 90, 132, 3.35e12, 1.98e9, 50 << 20, (989e12, 495e12, 67e12)),
    Machine("A100", 80, 108, 2.04e12, 1.41e9, 40 << 20, (312e12, 156e12, 19.5e12)),
    Machine("RTX 4090", 89, 128, 1.008e12, 2.52e9, 72 << 20, (165e12, 82.6e12, 82.6e12)),
    Machine("L4", 89, 58, 0.3e12, 2.04e9, 48 << 20, (121e12, 60e12, 30.3e12)),
    Machine("T4", 75, 40, 0.32e12, 1.59e9, 4 << 20, (65e12, 0, 8.1e12)),
    Machine("B200", 100, 148, 8.0e12, 1.965e9, 126 << 20, (2250e12, 1125e12, 75e12)),
    Machine("RTX A6000", 86, 84, 0.768e12, 1.8e9, 6 << 20, (155e12, 77e12, 38.7e12)),
    Machine("RTX 5090", 120, 170, 1.792e12, 2.41e9, 96 << 20, (209e12, 105e12, 105e12)),
)
_USUAL = {card.arch: card for card in reversed(CARDS)}
# Multiprocessors of the usual card of an architecture, for kernels that are compiled where there is none.
USUAL_MULTIPROCESSORS = {arch: _USUAL[arch].multiprocessors for arch in sorted(_USUAL)}


def named(name: str) -> Machine:
    """The listed card of this name, in whatever case and with or without spaces. Raises KeyError."""
    found = {card.name.lower().replace(" ", ""): card for card in CARDS}
    return found[name.lower().replace(" ", "").replace("_", "")]


@cache
def usual(arch: int, multiprocessors: int) -> Machine:
    """The listed card of an architecture with so many multiprocessors, or one made to their measure.

    Plans of kernels are made for it, so that those that are compiled where there is no GPU are those of a GPU.
    """
    for card in CARDS:
        if (card.arch, card.multiprocessors) == (arch, multiprocessors):
            return card
    like = _USUAL[_nearest(arch, _USUAL)]
    part = multiprocessors / like.multiprocessors
    half, tf, single = (part * rate for rate in like.products)
    return replace(
        like,
        name=f"sm_{arch} with {multiprocessors} multiprocessors",
        arch=arch,
        multiprocessors=multiprocessors,
        sheet_bandwidth=part * like.sheet_bandwidth,
        products=(half, tf, single),
    )


@cache
def of(device: Device) -> Machine:
    """The machine of a device: `usual`, with what its driver tells in place of what was looked up or guessed."""
    found = usual(device.arch, device.multiprocessors)
    return replace(
        found,
        sheet_bandwidth=device.bandwidth or found.sheet_bandwidth,
        sheet_clock=device.clock or found.sheet_clock,
        l2_bytes=device.l2_bytes or found.l2_bytes,
    )


def _nearest(arch: int, known: Iterable[int]) -> int:
    """The newest known architecture that is not newer, or else the oldest."""
    listed = sorted(known)
    return max((a for a in listed if a <= arch), default=listed[0])
