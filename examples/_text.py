"""The text that the language models learn, and yardsticks for it."""

from __future__ import annotations

import argparse
import gzip
import os
import sysconfig

import numpy as np

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
