"""Tables and plots of the file that a run writes."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, LibraryError

Rows = Sequence[Mapping[str, Any]]

_TITLES = "(L, B, d)|dtype|what|threads|median ms|min - max|n|rate|compared|target|error|same bits|peak MB|host us"


def read(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ArgumentError: it is none.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if any("label" not in row for row in report["rows"]):
            raise ValueError("a row has no label")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"sru_rt bench: {path} is no file of results ({type(error).__name__}: {error}); give one that a run wrote"
        ) from None
    return report


def table(rows: Rows) -> str:
    """Everything, a line for each row."""
    lines = [_TITLES.split("|"), ["---"] * len(_TITLES.split("|"))]
    lines += [_line(row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(row: Mapping[str, Any]) -> list[str]:
    cells = [shape(row), row["dtype"], row["label"], str(row["threads"])]
    if row["fault"] or "median_ms" not in row:
        return [*cells, row["fault"] or "not measured", *[""] * 9]
    cells += [f"{row['median_ms']:.4g}", f"{row['min_ms']:.4g} - {row['max_ms']:.4g}", str(row["n"])]
    cells.append(f"{row['rate']:.1f} {row['unit']}/s" if row["unit"] else "")
    cells.append(f"{ratio(row)} {row['sense']} {row['against']}" if "value" in row else "")
    cells.append(_target(row))
    cells.append(f"{row['error']:.1e}" if "error" in row else "")
    cells.append({True: "yes", False: "NO", None: ""}[row.get("same_bits")])
    return [*cells, *(f"{row[name]:g}" if name in row else "" for name in ("peak_mb", "host_us"))]


def _target(row: Mapping[str, Any]) -> str:
    found = []
    if "reached" in row:
        bound = "<=" if row["sense"] == "x" else ">="
        found.append(f"{bound} {row['target']:g} {'reached' if row['reached'] else 'MISSED'}")
    if "in_time" in row:
        found.append(f"<= {row['most_us']:g} us {'reached' if row['in_time'] else 'MISSED'}")
    return "; ".join(found)


def summary(rows: Rows) -> str:
    """What docs/performance.md shows: for each part a table with a row for each comparison, a column for each shape."""
    names = list(dict.fromkeys(row["part"] for row in rows))
    return "\n\n".join(_summary([row for row in rows if row["part"] == name], name) for name in names)


def _summary(rows: Rows, name: str) -> str:
    compared = [row for row in rows if "value" in row or row["fault"]]
    shapes = list(dict.fromkeys(shape(row) for row in compared))
    lines = [[name, *shapes, "target"], ["---"] * (len(shapes) + 2)]
    for label, dtype in dict.fromkeys((row["label"], row["dtype"]) for row in compared):
        of_label = [row for row in compared if (row["label"], row["dtype"]) == (label, dtype)]
        cells = [" / ".join(ratio(row) for row in of_label if shape(row) == one) for one in shapes]
        against = f": {of_label[0]['sense']} {of_label[0]['against']}" if of_label[0].get("against") else ""
        kind = f" ({dtype})" if dtype != "float32" else ""
        lines.append([f"{label}{kind}{against}", *cells, _goal(of_label)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _goal(rows: Rows) -> str:
    judged = [row for row in rows if "reached" in row]
    if not judged:
        return ""
    missed = sum(not row["reached"] for row in judged)
    verdict = "reached" if not missed else "missed" if missed == len(judged) else f"{missed} of {len(judged)} missed"
    targets = " / ".join(f"{target:g}" for target in dict.fromkeys(row["target"] for row in judged))
    return f"{'<=' if judged[0]['sense'] == 'x' else '>='} {targets}: {verdict}"


def ratio(row: Mapping[str, Any]) -> str:
    """By medians; in brackets by minima where the two differ by more than 5 %, as something else was running."""
    if row["fault"]:
        return str(row["fault"])
    apart = row["by_minima"] and abs(row["value"] / row["by_minima"] - 1) > 0.05
    return f"{row['value']:.2f}" + (f" ({row['by_minima']:.2f})" if apart else "")


def shape(row: Mapping[str, Any]) -> str:
    """As it stands in tables."""
    more = (f", D={row['D']}" if row.get("D", 1) > 1 else "") + (", ragged" if row.get("ragged") else "")
    more += f", {row['layers']} layers" if row.get("layers", 1) > 1 else ""
    return f"({', '.join(map(str, row['shape']))}{more})"


def plot(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture for each part, recurrence, dtype and pass with times at several shapes: time by contestant.

    Raises:
        LibraryError: Matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise LibraryError(
            "sru_rt bench: --plot needs Matplotlib; install it with pip install 'sru_rt[bench]'"
        ) from None
    matplotlib.use("svg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in report["rows"] if "median_ms" in row and row["who"] != "copy"]
    names = ("part", "cell", "dtype", "pass")
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in timed):
        rows = [row for row in timed if tuple(row[name] for name in names) == key]
        if len({shape(row) for row in rows}) > 1:
            found.append(folder / (re.sub(r"\W+", "_", "-".join(key)) + ".svg"))
            _picture(pyplot, rows, f"{key[0]}: {key[1]}, {key[2]}, {key[3]}", _caption(report), found[-1])
    return found


def _picture(pyplot: Any, rows: Rows, title: str, caption: str, path: Path) -> None:
    shapes = list(dict.fromkeys(shape(row) for row in rows))
    most = max(row["threads"] for row in rows)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for who in dict.fromkeys(row["who"] for row in rows):
        own = {shape(row): row for row in rows if row["who"] == who and row["threads"] == most}
        at = [i for i, one in enumerate(shapes) if one in own]
        middle = [own[shapes[i]]["median_ms"] for i in at]
        spread = [[m - own[shapes[i]]["min_ms"] for i, m in zip(at, middle)], [0.0] * len(at)]
        axes.errorbar(at, middle, spread, marker="o", capsize=3, label=who)
    axes.set_xticks(range(len(shapes)), shapes, rotation=20)
    axes.set(yscale="log", ylabel="ms: median, down to the minimum", xlabel="L, B, d", title=title)
    axes.legend(fontsize="small")
    figure.text(0.01, -0.03, caption, fontsize="x-small")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _caption(report: Mapping[str, Any]) -> str:
    device = report.get("gpu", {}).get("device") or report["machine"]["cpu"]
    return f"{device}; sru_rt {report['versions']['sru_rt']}, commit {report['commit'][:12]}, {report['date']}"
