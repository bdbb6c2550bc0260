"""What char_lm.py needs beside its model: command line, text, yardsticks for the text, progress line."""

from __future__ import annotations

import argparse
import gzip
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable

import numpy as np
from _device import CHOICES, HELP

TEXT_CAP = 6_000_000  # bytes of the default text
NO_TEXT = set("test tests idle_test lib2to3 encodings pydoc_data site-packages dist-packages __pycache__".split())


def standard_library() -> bytes:
    """The source of Python's standard library, file after file in a fixed order, up to TEXT_CAP bytes."""
    parts, size = [], 0
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - NO_TEXT)
        for name in sorted(name for name in files if name.endswith(".py")):
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    parts.append(file.read().encode())
            except (OSError, UnicodeDecodeError):
                continue
            size += len(parts[-1])
            if size >= TEXT_CAP:
                return b"".join(parts)[:TEXT_CAP]
    return b"".join(parts)


def read_text(path: str | None) -> bytes:
    """The bytes of a file, or of the standard library's source if there is no path."""
    if path is None:
        return standard_library()
    with open(path, "rb") as file:
        return file.read()


def split_text(args: argparse.Namespace, fail) -> tuple[bytes, bytes]:
    """The training part and the validation part of the text."""
    try:
        text = read_text(args.text)
    except OSError as error:
        fail(f"argument --text: cannot read {args.text}: {error.strerror}")
    cut = len(text) - len(text) // 10
    if cut < max(100, args.batch * (args.length + 1)):
        fail(
            f"argument --text: {args.text or 'the standard library'} has {len(text):,} characters, too few "
            f"for --batch {args.batch} streams with pieces of --length {args.length}"
        )
    return text[:cut], text[cut:]


def unigram_bits(train: bytes, valid: bytes) -> float:
    """Bits per character of a model that knows only how often each byte occurs in the training part."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
    return float(-np.log2(counts / counts.sum())[np.frombuffer(valid, np.uint8)].mean())


def gzip_bits(train: bytes, valid: bytes) -> float:
    """Bits per character that the validation part adds to the packed training part."""
    return 8 * (len(gzip.compress(train + valid, 9)) - len(gzip.compress(train, 9))) / len(valid)


def check_writable(path: str) -> None:
    """OSError now rather than after the training, if a file cannot be written there."""
    if os.path.isdir(path):
        raise IsADirectoryError(0, "it is a folder")
    with open(path + ".tmp", "wb"):
        pass
    os.remove(path + ".tmp")


class Parser(argparse.ArgumentParser):
    """Every complaint to the user is one line that names the option, with exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float from low, or above low, to below high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < high or (above and value == low):
            what = f"a {'whole ' if kind is int else ''}number {'above' if above else 'from'} {low}"
            limit = f" to below {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"needs {what}{limit}, got {text!r}")
        return value

    return parse


def make_parser(description: str, model: dict, cells: Iterable[str]) -> Parser:
    """The command line; `model` holds the defaults of the options that a weights file fixes."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, positive, default = number(int, 1), number(float, 0, above=True), "(default %(default)s)"
    add = parser.add_argument
    add("--text", metavar="FILE", help="what to learn (default: the source of Python's standard library)")
    add("--out", metavar="FILE", help="where the weights go (default: the --resume file, or char_lm.npz)")
    add("--resume", metavar="FILE", help="go on with these weights; they fix cell, layers, d, embed and dtype")
    add("--steps", type=count, metavar="N", help="train for N pieces of --length characters")
    add("--minutes", type=positive, help="train for so long (default 1.7, or no limit with --steps)")
    add("--cell", choices=cells, help=f"the recurrence (default {model['cell']})")
    add("--layers", type=count, metavar="N", help=f"its layers (default {model['layers']})")
    add("--d", type=count, metavar="N", help=f"hidden size (default {model['d']})")
    add("--embed", type=count, metavar="N", help=f"size of the embedding (default {model['embed']})")
    add("--dtype", choices=["float32", "float64"], help=f"of all arrays (default {model['dtype']})")
    add("--device", choices=CHOICES, default="auto", help=HELP)
    add("--batch", type=count, default=32, metavar="N", help=f"parallel streams {default}")
    add("--length", type=count, default=64, metavar="N", help=f"characters of a piece {default}")
    add("--lr", type=positive, default=0.01, help=f"highest learning rate {default}")
    add("--dropout", type=number(float, 0, 1), default=0.0, help=f"rate for what layers give {default}")
    add("--seed", type=number(int, 0), default=0, help=f"of weights, dropout and samples {default}")
    add(
        "--sample",
        type=count,
        nargs="?",
        const=500,
        metavar="N",
        help="only write N characters (default 500) with the weights of --resume, --out or char_lm.npz",
    )
    add("--prompt", default="\n", help="what the sample begins with (default: a new line)")
    add("--temperature", type=positive, default=0.8, help=f"of the sample; lower is safer {default}")
    return parser


class Progress:
    """On a terminal one line that rewrites itself, elsewhere a plain line every five percent."""

    def __init__(self) -> None:
        self.terminal, self.next = sys.stdout.isatty(), 0.0

    def due(self, fraction: float) -> bool:
        return time.perf_counter() >= self.next if self.terminal else fraction >= self.next

    def show(self, fraction: float, text: str) -> None:
        text = f"{fraction:4.0%}  {text}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + f"[{'#' * int(10 * fraction):-<10}] {text}"[:width].ljust(width), end="", flush=True)
            self.next = time.perf_counter() + 0.2
        else:
            print(text, flush=True)
            self.next = fraction + 0.05

    def note(self, text: str) -> None:
        """A line that stays, in place of the one that rewrites itself."""
        if self.terminal:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r")
        print(text, flush=True)
