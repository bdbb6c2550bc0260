"""The command line: `python -m sru_rt doctor`, `python -m sru_rt warm` and `python -m sru_rt bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ._version import __version__
from .calls import MANY
from .dtypes import IO_DTYPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status, 2 for a command line that is not understood."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(measures=list(arguments[:1]) == ["bench"])
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    if options.command == "doctor":
        from . import doctor

        return doctor.run(as_json=options.json)
    if options.command == "bench":
        from .bench import command

        return command.run(options)
    from . import warm

    return warm.run(options)


def _parser(measures: bool = False) -> argparse.ArgumentParser:
    """`measures`: with the options of bench, whose parts and contestants are imported for that."""
    parser = argparse.ArgumentParser("python -m sru_rt", description="Recurrences compiled at run time.")
    parser.add_argument("--version", action="version", version=f"sru_rt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="say what is installed and what is missing, and try each backend",
        description="Says what is installed, found and set, which commands mend what is missing, and runs a small "
        "recurrence on each backend. Exit status 0 if at least one of them computes rightly, else 1.",
    )
    doctor.add_argument("--json", action="store_true", help="write the same as JSON")
    _add_warm(commands)
    _add_bench(commands, measures)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser], measures: bool) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure recurrences and layers beside copies, products and other libraries",
        description="Measures recurrences and layers beside copies, matrix products and what is installed of other "
        "libraries; compares results with float64 first, and gives no speed where they differ. Writes a file and a "
        "table. Exit status 1 if a result is wrong or there is no GPU to measure, 2 if a file does not fit.",
    )
    if measures:
        from .bench import command

        command.add(bench)


def _add_warm(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    warm = commands.add_parser(
        "warm",
        help="compile kernels into the cache, without a GPU",
        description="Compiles the kernels that calls with these options will look for. Each option with several values "
        "stands for calls with each of them. Exit status 1 if a kernel cannot be compiled or kept.",
        epilog="Example: python -m sru_rt warm --arch sm_80 sm_90 --cell sru --d 512 --dtype bfloat16 --length many 1",
    )
    add = warm.add_argument
    add("--list", action="store_true", help="write the names of the cells, and do nothing else")
    add("--arch", nargs="+", type=_arch, default=[], metavar="sm_90", help="architectures of the GPUs")
    add("--cpu", action="store_true", help="also compile for the CPU of this machine")
    add("--cell", nargs="+", default=[], metavar="NAME", help="cells; see --list")
    add("--dtype", nargs="+", default=[], choices=IO_DTYPES, help="dtypes of x")
    add("--d", nargs="+", type=_positive, default=[], metavar="N", help="hidden sizes per direction")
    add("--directions", nargs="+", type=int, choices=(1, 2), default=[1], help="numbers of directions (default: 1)")
    add(
        "--save",
        nargs="+",
        type=_save,
        default=[False, True],
        metavar="no|every|x|K",
        help="what save= is: no for False, every for True, x, or a number of steps (default: no every)",
    )
    add(
        "--batch",
        nargs="+",
        type=_positive,
        default=[],
        metavar="N",
        help="batch sizes, for kernels of their own (default: kernels for any batch size)",
    )
    add(
        "--length",
        nargs="+",
        type=_length,
        default=[MANY],
        metavar="many|N",
        help="time steps, which matter only where they are 1, as in sru_step, fewer than K, or too few to be cut into "
        "chunks (default: many, cut or not)",
    )
    add(
        "--time-parallel",
        choices=("auto", "yes", "no"),
        default="auto",
        help="what time_parallel= is: yes for True, no for False (default: auto)",
    )
    add(
        "--d-in",
        nargs="+",
        type=_positive,
        default=[0],
        metavar="N",
        help="columns of the weight, for steps of few sequences (with --length 1 --save no) and for small layers (with "
        "--save no), whose kernels form U (default: U is given)",
    )
    add("--mask", action="store_true", help="calls with mask=")
    add("--reset", action="store_true", help="calls with reset=")
    add("--no-dx", action="store_true", help="calls of sru_backward with a need= that leaves x out")
    add("--saved-dtype", choices=("state", "x"), default="state", help="states kept in the dtype of the state or of x")
    add("--param-dtype", choices=("x", "state"), default="x", help="biases and v in the dtype of x or of the state")
    add(
        "--multiprocessors",
        nargs="+",
        type=_positive,
        default=[],
        metavar="N",
        help="of the GPUs (default: those of the usual card of each architecture)",
    )


def _arch(text: str) -> int:
    number = text.removeprefix("sm_").replace(".", "")
    if not number.isdecimal() or int(number) < 10:
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture such as sm_90")
    return int(number)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _length(text: str) -> int:
    return MANY if text == "many" else _positive(text)


def _save(text: str) -> bool | str | int:
    named: dict[str, bool | str] = {"no": False, "every": True, "x": "x"}
    return named[text] if text in named else _positive(text)


def _run() -> int:
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(_run())
