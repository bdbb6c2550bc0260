"""The examples with PyTorch, on small files that are made here: called, or started by torchrun as a user does."""

from __future__ import annotations

import gzip
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WORDS = "film plot actor scene story camera music ending".split()
CLASSES = ["dreadful", "superb", "which", "whose", "where", "when"]  # the word that makes a sentence of class 0, 1, ...
MODELS = "sru lstm qrnn cnn".split()
CELLS = "sru qrnn mingru minlstm lstm".split()
TRAINING_FILE = {
    "MR": "rt-polarity.all",
    "SUBJ": "subj.all",
    "CR": "custrev.all",
    "MPQA": "mpqa.all",
    "TREC": "TREC.train.all",
    "SST": "stsa.binary.phrases.train.gz",
}


def sentences(count: int, classes: int = 2, seed: int = 0) -> list[str]:
    """Lines of a label and a sentence, sorted by class as the real files are."""
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        label = i * classes // count
        words = rng.choices(WORDS, k=rng.randint(0, 5))
        words.insert(rng.randint(0, len(words)), CLASSES[label])
        lines.append(f"{label} {' '.join(words)}\n")
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all six sets in their formats, and vectors."""
    path = tmp_path_factory.mktemp("sentclass")
    plain = "".join(sentences(300))
    (path / "rt-polarity.all").write_bytes(plain.replace("plot", "\x85plot", 3).encode("latin-1"))
    (path / "subj.all").write_bytes(plain.replace("plot", "caf\xe9", 3).encode("latin-1"))
    (path / "custrev.all").write_text(plain + "0 \n1 \n", encoding="ascii")  # two empty sentences
    (path / "mpqa.all").write_text(plain, encoding="ascii")
    (path / "TREC.train.all").write_text("".join(sentences(300, 6)).title(), encoding="latin-1")
    (path / "TREC.test.all").write_text("".join(sentences(60, 6, seed=1)).title(), encoding="latin-1")
    (path / "stsa.binary.phrases.train.gz").write_bytes(gzip.compress((plain + "1 superb na\xefve\n").encode("utf-8")))
    (path / "stsa.binary.dev").write_text("".join(sentences(40, seed=1)), encoding="utf-8")
    (path / "stsa.binary.test").write_text("".join(sentences(40, seed=2)), encoding="utf-8")
    rng = np.random.default_rng(0)
    rows = [f"{word} {' '.join(f'{v:.4f}' for v in rng.normal(size=12))}\n" for word in WORDS + CLASSES]
    (path / "vectors.txt").write_text(f"{len(rows)} 12\n" + "".join(rows), encoding="utf-8")
    (path / "glove.txt.gz").write_bytes(gzip.compress("".join(rows[:5]).encode()))  # GloVe's have no first line
    (path / "alone").mkdir()
    for name in ("TREC.train.all", "stsa.binary.phrases.train.gz"):
        (path / "alone" / name).write_bytes((path / name).read_bytes())
    (path / "alone" / "rt-polarity.all").write_text("positive superb film\n")
    (path / "alone" / "other.txt").write_text("1 superb film\n")
    (path / "alone" / "mpqa.all").write_text("")
    (path / "alone" / "subj.all.gz").write_text("1 superb film\n")
    (path / "alone" / "words.txt").write_text("2 3\nfilm 1 2\n")
    (path / "alone" / "strange.txt").write_text("1 3\nbook 1 2 3\n")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other take long where all cores run tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """Imports an example by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return __import__


@pytest.fixture
def run(program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls an example with a command line; what it printed, or with `code` 2 what it complained of."""

    def call(name: str, *options: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        try:
            returned = program(name).main()
        except SystemExit as error:
            returned = error.code
        printed = capsys.readouterr()
        assert returned == code, printed.err
        assert code == 0 or printed.out == ""
        return printed.err if code else printed.out

    return call


# ----------------------------------------------------------------------------------------------------------------------
# Classification

SMALL = "--d 16 --batch 16 --lr 0.02 --dropout 0.1 --epochs 6".split()
ROW = r"^{} +([\d,]+) +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+)"


def classify(run, folder: Path, name: str, *options: object) -> dict[str, tuple[int, float, float]]:
    """Parameters, validation and test accuracy of each model in the table."""
    data = ["--data", folder / TRAINING_FILE[name], "--vectors", folder / "vectors.txt"]
    printed = run("torch_classify", *data, *SMALL, *options)
    assert re.search(rf"^{name}: \d+ sentences, {6 if name == 'TREC' else 2} classes; ", printed, re.MULTILINE)
    rows = {model: re.search(ROW.format(model), printed, re.MULTILINE) for model in MODELS}
    return {m: (int(r[1].replace(",", "")), float(r[2]), float(r[3])) for m, r in rows.items() if r}


@pytest.mark.parametrize("name", TRAINING_FILE)
def test_every_set_is_read_and_learnt(run, folder: Path, name: str) -> None:
    (result,) = classify(run, folder, name).values()
    assert result[1] > 80 and result[2] > 80


def test_every_model_learns_and_none_depends_on_the_others(run, folder: Path) -> None:
    together = classify(run, folder, "MR", "--model", *MODELS, "--folds", 2)
    assert together.keys() == set(MODELS)
    assert all(test > 80 for _, _, test in together.values())
    alone = classify(run, folder, "MR", "--model", "sru", "--folds", 2)
    assert alone["sru"] == together["sru"]


def test_papers_sizes(program) -> None:
    """The numbers of parameters are those of table 1 in the paper of 2018, which gives them in thousands."""
    import argparse

    args, classifier = argparse.Namespace(layers=2, d=128, dropout=0.5), program("torch_classify").Classifier
    for name, size in {"sru": 204, "lstm": 352, "qrnn": 204, "cnn": 360}.items():
        model = classifier(name, torch.zeros(4, 300), 2, args)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) / 1000 == pytest.approx(size, abs=1), name


def test_same_seed_same_loss(run, folder: Path) -> None:
    def losses(seed: int) -> list[str]:
        data = ["--data", folder / "mpqa.all", "--vectors", folder / "vectors.txt", folder / "glove.txt.gz"]
        printed = run("torch_classify", *data, *SMALL, "--epochs", 2, "--seed", seed, "--model", *MODELS)
        assert "vectors of size 24" in printed
        return re.findall(r"loss ([\d.]+)", printed)

    first, again, other = losses(3), losses(3), losses(4)
    assert len(first) == 2 * len(MODELS)
    assert first == again
    assert all(a != b for a, b in zip(first, other))


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(program, name: str) -> None:
    import argparse

    torch.manual_seed(0)
    vectors = torch.randn(9, 12)
    vectors[0] = 0
    model = program("torch_classify").Classifier(name, vectors, 2, argparse.Namespace(layers=2, d=16, dropout=0.5))
    words, lengths = torch.randint(1, 9, (9, 4)), torch.tensor([9, 5, 2, 1])
    for b, length in enumerate(lengths):
        words[length:, b] = 0
    model.eval()
    together = model(words, lengths)
    for b, length in enumerate(lengths):
        alone = model(words[:length, b : b + 1], lengths[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-6)


def test_cleaning_and_splits(program) -> None:
    module = program("_sentclass")
    assert module.words_of("It's (not) \xe9 don't, OK?", module.FORMATS["MR"]) == "it 's ( not ) do n't , ok ?".split()
    assert module.words_of("What?", module.FORMATS["TREC"]) == ["What", "?"]
    assert module.words_of("it 's -lrb- \xe9", module.FORMATS["SST"]) == ["it", "'s", "-lrb-", "\xe9"]

    held_out = []
    for fold in range(10):
        parts = module.split(module.Corpus([], [], range(103), range(103, 103), range(103, 103)), fold)
        assert sorted(i for part in parts for i in part) == list(range(103))
        assert len(parts[1]) == 10
        held_out += parts[2]
    assert sorted(held_out) == list(range(103))
    train, valid, test = module.split(module.Corpus([], [], range(50), range(50, 50), range(50, 60)), 4)
    assert sorted(train + valid) == list(range(50)) and len(valid) == 5 and test == list(range(50, 60))


def test_vectors_have_unit_length(program, folder: Path) -> None:
    words = ["Film", "film", "nowhere"]
    vectors, known = program("_sentclass").embed(words, folder / "glove.txt.gz", np.random.default_rng(0), pytest.fail)
    assert known.tolist() == [True, True, False]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "data, vectors, says",
    [
        ("missing/rt-polarity.all", "vectors.txt", "MR (movie reviews, positive or negative), which is to be had from"),
        ("alone/TREC.train.all", "vectors.txt", "TREC.test.all"),
        ("alone/stsa.binary.phrases.train.gz", "vectors.txt", "stsa.binary.dev"),
        ("alone/other.txt", "vectors.txt", "--format"),
        ("alone/rt-polarity.all", "vectors.txt", "line 1 of "),
        ("alone/mpqa.all", "vectors.txt", "is empty"),
        ("alone/subj.all.gz", "vectors.txt", "is no file of SUBJ"),
        ("rt-polarity.all", "missing.txt", "https://code.google.com/archive/p/word2vec"),
        ("rt-polarity.all", "alone", "cannot read "),
        ("rt-polarity.all", "alone/words.txt", "line 2 is not a word and 3 numbers"),
        ("rt-polarity.all", "alone/strange.txt", "none of the words"),
    ],
)
def test_a_file_that_is_missing_or_wrong_is_one_line(run, folder: Path, data: str, vectors: str, says: str) -> None:
    complaint = run("torch_classify", "--data", folder / data, "--vectors", folder / vectors, code=2)
    assert complaint.startswith("torch_classify.py: argument --")
    assert complaint.count("\n") == 1
    assert says in complaint


BAD = """--format=IMDB --model=gru --epochs=0 --folds=11 --layers=0 --d=x --dropout=1 --lr=0 --batch=0 --seed=-1
--threads=0 --device=tpu""".split()


@pytest.mark.parametrize("option", BAD)
def test_a_bad_argument_of_classify_is_one_line(run, option: str) -> None:
    complaint = run("torch_classify", "--data", "rt-polarity.all", "--vectors", "v.txt", option, code=2)
    assert complaint.startswith(f"torch_classify.py: argument {option.split('=')[0]}: ")
    assert complaint.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Character language model

TINY = "--layers 2 --d 32 --embed 16 --batch 8 --length 32 --sample 60".split()
FINAL = re.compile(
    r"^validation ([\d.]+) bits per character \(unigram ([\d.]+), gzip ([\d.]+)\)\nsample:\n", re.MULTILINE
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sentences in random order."""
    rng = random.Random(0)
    lines = [" ".join(rng.sample(WORDS + CLASSES, 6)) + ".\n" for _ in range(5)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(rng.choices(lines, k=600)))
    return path


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_learns_and_writes(run, text: Path, cell: str) -> None:
    printed = run("torch_char_lm", "--text", text, "--cell", cell, "--steps", 150, *TINY)
    assert f"2 {cell} layers, d = 32" in printed
    final = FINAL.search(printed)
    assert final and float(final[1]) < float(final[2]) - (0.2 if cell == "lstm" else 2)  # which takes longer
    if cell == "lstm":
        return
    words = printed[final.end() :].replace(".", " ").split()
    assert sum(word in WORDS + CLASSES for word in words) > len(words) / 2


def test_same_seed_same_text(run, text: Path) -> None:
    def written(seed: int) -> str:
        printed = run("torch_char_lm", "--text", text, "--steps", 10, "--seed", seed, *TINY)
        return printed[FINAL.search(printed).start() :]

    assert written(5) == written(5) != written(6)


@pytest.mark.parametrize("cell", CELLS)
def test_pieces_and_steps_follow_the_whole(program, cell: str) -> None:
    torch.manual_seed(1)
    model = program("torch_char_lm").Model(cell, layers=2, d=12, embed=8)
    tokens = torch.randint(256, (7, 3))
    whole, _ = model(tokens, model.first_state(3))
    state = model.first_state(3)
    for t in range(7):
        logits, state = model.step(tokens[t], state)
        torch.testing.assert_close(logits, whole[t], rtol=1e-5, atol=1e-5)
    _, state = model(tokens[:4], model.first_state(3))
    torch.testing.assert_close(model(tokens[4:], state)[0], whole[4:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_model_learns(run, text: Path) -> None:
    printed = run("torch_char_lm", "--text", text, "--compile", "--steps", 120, *TINY)
    final = FINAL.search(printed)
    assert final and float(final[1]) < float(final[2]) - 2


@pytest.mark.parametrize(
    "option",
    "--text=missing.txt --cell=gru --steps=0 --minutes=0 --batch=10000000 --lr=0 --prompt= --device=tpu".split(),
)
def test_a_bad_argument_of_char_lm_is_one_line(run, option: str) -> None:
    complaint = run("torch_char_lm", option, code=2)
    name = "--text" if option.startswith("--batch") else option.split("=")[0]
    assert complaint.startswith(f"torch_char_lm.py: argument {name}: ")
    assert complaint.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("option", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_train_agree_and_load_what_they_saved(tmp_path: Path, option: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--steps", "30", "--hidden", "32", "--checkpoint", str(tmp_path / "checkpoint"), *option]
    command = [*torchrun, str(EXAMPLES / "torch_ddp.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    falls = re.search(r"^training loss ([\d.]+), after 30 steps ([\d.]+)$", result.stdout, re.MULTILINE)
    held = re.search(r"rank 0 holds ([\d,]+) parameters$", result.stdout, re.MULTILINE)
    valid = re.search(r"^validation loss ([\d.]+), then ([\d.]+), on all ranks the same$", result.stdout, re.MULTILINE)
    loaded = re.search(r"^saved in .+ and loaded: validation loss ([\d.]+); five steps on", result.stdout, re.MULTILINE)
    assert falls and held and valid and loaded, result.stdout
    assert float(falls[2]) < float(falls[1]) - 1
    assert float(valid[2]) < float(valid[1]) - 0.5
    assert loaded[1] == valid[2]
    whole = 256 * 32 + 2 * (3 * 32 * 32 + 4 * 32) + 32 * 256 + 256
    assert int(held[1].replace(",", "")) == (whole // 2 if option else whole)
    assert list((tmp_path / "checkpoint").glob("*.distcp"))


def test_without_torchrun_ddp_says_how_to_start(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun --nproc-per-node 2" in run("torch_ddp", code=2)
