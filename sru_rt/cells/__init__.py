"""The built-in cells: one file each, with its step function and its public functions."""

from .sru import sru_backward, sru_forward, sru_init, sru_recurrence, sru_step

__all__ = ["sru_backward", "sru_forward", "sru_init", "sru_recurrence", "sru_step"]
