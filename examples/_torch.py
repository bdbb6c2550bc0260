"""Where the examples with PyTorch run, and on how many threads."""

from __future__ import annotations

import os

import torch

CHOICES = ("auto", "cpu", "cuda")
HELP = "where to run; auto is a GPU if PyTorch finds one (default %(default)s)"
THREADS_HELP = "CPU threads of PyTorch and of the recurrence (default: all cores)"


def choose(wanted: str, fail) -> torch.device:
    """The device for one of CHOICES. `fail` takes a message and does not return."""
    if wanted == "cuda" and not torch.cuda.is_available():
        fail("argument --device: PyTorch finds no GPU; --device cpu goes on without")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def use_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
        os.environ["SRU_RT_NUM_THREADS"] = str(count)  # read at each call of a kernel
