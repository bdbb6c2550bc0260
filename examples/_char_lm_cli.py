"""The command line of char_lm.py."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from _cli import Parser, number
from _device import CHOICES, HELP


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
