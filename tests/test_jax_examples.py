"""The example with JAX, on a small text that is made here, called as a user does."""

from __future__ import annotations

import random
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("equinox", reason="needs Equinox")
pytest.importorskip("optax", reason="needs Optax")

import jax
import jax.numpy as jnp

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WORDS = "film plot actor scene story camera music ending dreadful superb which whose where when".split()
TINY = "--layers 2 --d 32 --embed 16 --batch 8 --length 32 --sample 60".split()
FINAL = re.compile(
    r"^validation ([\d.]+) bits per character \(unigram ([\d.]+), gzip ([\d.]+)\)\nsample:\n", re.MULTILINE
)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return __import__("jax_char_lm")


@pytest.fixture
def run(program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the example with a command line; what it printed, or with `code` 2 what it complained of."""

    def call(*options: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["jax_char_lm.py", *map(str, options)])
        try:
            returned = program.main()
        except SystemExit as error:
            returned = error.code
        printed = capsys.readouterr()
        assert returned == code, printed.err
        assert code == 0 or printed.out == ""
        return printed.err if code else printed.out

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sentences in random order."""
    rng = random.Random(0)
    lines = [" ".join(rng.sample(WORDS, 6)) + ".\n" for _ in range(5)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(rng.choices(lines, k=600)))
    return path


def test_learns_and_writes(run, text: Path) -> None:
    printed = run("--text", text, "--steps", 150, *TINY)
    assert "2 sru layers, d = 32" in printed
    assert re.search(r"^ *100%  step 150  [\d.]+ bits/char  [\d,]+ chars/s  0:00 left$", printed, re.MULTILINE)
    final = FINAL.search(printed)
    assert final and float(final[1]) < float(final[2]) - 2
    words = printed[final.end() :].replace(".", " ").split()
    assert sum(word in WORDS for word in words) > len(words) / 2


def test_same_seed_same_text(run, text: Path) -> None:
    def written(seed: int) -> str:
        printed = run("--text", text, "--cell", "minlstm", "--steps", 5, "--seed", seed, *TINY)
        return printed[FINAL.search(printed).start() :]

    assert written(5) == written(5) != written(6)


@pytest.mark.parametrize("cell", ["qrnn", "mingru"])
def test_pieces_and_steps_follow_the_whole(program, cell: str) -> None:
    model = program.Model(cell, layers=2, d=12, embed=8, key=jax.random.key(1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(256, size=(7, 3)))
    whole, _ = model(tokens, model.layers.initial_step_state(3))
    pieces, state = model(tokens[:4], model.layers.initial_step_state(3))
    rest, _ = model(tokens[4:], state)
    np.testing.assert_allclose(jnp.concatenate([pieces, rest]), whole, rtol=1e-4, atol=1e-5)
    _, stepped = jax.lax.scan(
        lambda state, token: model.step(token, state)[::-1], model.layers.initial_step_state(), tokens[:, 1]
    )
    np.testing.assert_allclose(stepped, whole[:, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option", "--text=missing.txt --cell=gru --steps=0 --minutes=0 --batch=10000000 --lr=0 --prompt= --seed=-1".split()
)
def test_a_bad_argument_is_one_line(run, option: str) -> None:
    complaint = run(option, code=2)
    name = "--text" if option.startswith("--batch") else option.split("=")[0]
    assert complaint.startswith(f"jax_char_lm.py: argument {name}: ")
    assert complaint.count("\n") == 1
