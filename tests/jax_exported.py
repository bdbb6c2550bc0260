"""Programs of test_jax_export.py: python jax_exported.py write|read|error POLICY PLATFORMS.

They leave and find their files, and the module `cells`, in the current folder.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

sys.path.insert(0, ".")
what, policy, *platforms = sys.argv[1:]


def loss(model: Any) -> Any:
    return jax.jit(jax.grad(lambda *given: (model(*given)[0] ** 2).sum(), (0, 2, 3)))


def arrays(name: str) -> list[Any]:
    return [jnp.asarray(a) for a in np.load(f"{name}.npz").values()]


def write() -> None:
    import cells
    from sru_rt.bindings import jax as binding

    import sru_rt

    params = sru_rt.sru_init(6, 5, directions=2, rng=0, like=jnp.zeros(1))
    gates = cells.leaky.init(5 * 2, 4, rng=0, params={"b": 1.0}, like=jnp.zeros(1))
    alpha = params.pop("alpha", 1.0)
    recompute = {"all": False, "x": "x"}[policy]

    def model(x: Any, lengths: Any, params: Any, gates: Any) -> Any:
        h, c = binding.sru(x, **params, alpha=alpha, lengths=lengths, recompute=recompute)
        return binding.own_cell(cells.leaky, h, **gates, k=0.75)[0], c

    L, B = export.symbolic_shape("L, B")
    checks = [export.DisabledSafetyCheck.custom_call(binding.target())]
    rest = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, gates))
    given = jax.ShapeDtypeStruct((L, B, 6), "float32"), jax.ShapeDtypeStruct((B,), "int32"), *rest
    exported = export.export(jax.jit(model), disabled_checks=checks, platforms=platforms)(*given)
    with open("model", "wb") as file:
        file.write(exported.serialize(vjp_order=1))
    for L, B in ((7, 3), (4, 1)):
        x = jnp.sin(jnp.arange(L * B * 6.0)).reshape(L, B, 6)
        lengths = jnp.arange(B) + 2
        results = model(x, lengths, params, gates), loss(model)(x, lengths, params, gates)
        np.savez(f"wanted{L}", *jax.tree.leaves((x, lengths, results)))
    np.savez("params", *jax.tree.leaves((params, gates)))


def read() -> None:
    exported, given = loaded()
    for L in (7, 4):
        x, lengths, *wanted = arrays(f"wanted{L}")
        results = exported.call(x, lengths, *given), loss(exported.call)(x, lengths, *given)
        for a, b in zip(jax.tree.leaves(results), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def error() -> None:
    """Prints what goes wrong, and goes on."""
    exported, given = loaded()
    x, lengths, *_ = arrays("wanted7")
    try:
        jax.block_until_ready(exported.call(x, lengths, *given))
    except Exception as error:
        print(type(error).__name__, error)
    assert jnp.ones(3).sum() == 3


def loaded() -> tuple[Any, Any]:
    """The program, and its parameters."""
    if policy != "no binding":
        import sru_rt.bindings.jax  # noqa: F401  (which alone is enough)
    with open("model", "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    n = exported.in_tree.num_leaves
    args, _ = exported.in_tree.unflatten(list(range(n)))
    return exported, jax.tree.unflatten(jax.tree.structure(args[2:]), arrays("params"))


{"write": write, "read": read, "error": error}[what]()
print("done")
