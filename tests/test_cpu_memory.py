"""How a sweep on the CPU deals with memory: nothing of it may change a bit.

Memory is asked for before a sweep comes to it, and large results are written past the caches. Flags make that so for
results of every size, or of none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sru_rt import source

NEVER = 1 << 62
HOW = {
    "nothing": f"-DSRU_FAR_BYTES={NEVER}LL -DSRU_STREAMING_BYTES={NEVER}LL",
    "asked for": f"-DSRU_FAR_BYTES=1 -DSRU_STREAMING_BYTES={NEVER}LL",
    "past the caches": "-DSRU_FAR_BYTES=1 -DSRU_STREAMING_BYTES=1",
}
# Rows shorter and longer than what is asked for ahead, with and without the end of a pack; single rows of a step; both
# directions; boundaries within a sequence. Lengths of 0 leave rows out.
SCRIPT = """
import hashlib
import numpy as np
import sru_rt
from sru_rt import launch

launch._ELEMENTS_PER_TASK = 64
rng = np.random.default_rng(7)
for L, B, D, d in [(7, 3, 1, 16), (5, 1, 2, 48), (4, 2, 1, 512), (6, 2, 2, 530), (3, 1, 1, 1040), (4, 3, 1, 1101)]:
    for dtype in "float32", "float16":
        for save in True, 3:
            for lengths in None, np.arange(B) % L:
                u, x = (rng.standard_normal(shape).astype(dtype) for shape in ((L, B, D, 3, d), (L, B, D * d)))
                bias, v = (rng.standard_normal((D, 2, d), dtype=np.float32) for _ in range(2))
                places = {"lengths": lengths, "reset": rng.random((L, B)) < 0.2}
                c0 = rng.standard_normal((D, B, d), dtype=np.float32)
                h, c, saved = sru_rt.sru_recurrence(u, x, bias, v, c0, **places, save=save)
                plain, _ = sru_rt.sru_recurrence(u, x, bias, v, c0, **places)
                assert plain.tobytes() == h.tobytes()
                gradients = sru_rt.sru_backward(saved, np.ones_like(h), np.ones_like(c))
                found = [h, c, *(getattr(gradients, name) for name in ("u", "x", "bias", "v", "c0"))]
                print(L, B, D, d, dtype, save, hashlib.sha256(b"".join(a.tobytes() for a in found)).hexdigest())
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """What the script prints, by how it was compiled."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def run(flags: str) -> str:
        settings = {"SRU_RT_CXXFLAGS": flags, "SRU_RT_CACHE_DIR": cache, "SRU_RT_CPU": "compiled"}
        settings["PYTHONPATH"] = str(Path(source.__file__).parent.parent)
        settings["SRU_RT_NUM_THREADS"] = "2"
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return {how: run(flags) for how, flags in HOW.items()}


@pytest.mark.parametrize("how", [how for how in HOW if how != "nothing"])
def test_memory_does_not_change_a_bit(how, results):
    assert len(results["nothing"].splitlines()) == 48
    assert results[how] == results["nothing"]
