"""What the larger examples share of their command lines: complaints, numbers, files, a progress line."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable


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
