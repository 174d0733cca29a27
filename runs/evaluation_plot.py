"""The pictures of an evaluation, each from what evaluate.json holds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.metrics import LABELS

COLOURS = {"learned": "#c2452d", "oracle": "#4c9a5f", "random": "#8c8c8c"}
BLUE = "#35618f"
Results = dict[str, Any]


def positions(results: Results) -> Figure:
    """The metric against the tokens that a label sees."""
    rows, metric = results["positions"]["rows"], results["metric"]
    figure, axes = sheet((6.4, 4.0))
    middle = [(row["first"] * row["last"]) ** 0.5 for row in rows]
    axes.plot(middle, [row[metric] for row in rows], color=BLUE, marker="o", linewidth=2)
    axes.set_xscale("log", base=2)
    ends = [dict.fromkeys((f"{row['first']:,}", f"{row['last']:,}")) for row in rows]
    axes.set_xticks(middle, ["–".join(each) for each in ends], rotation=35, fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("tokens that a label sees")
    axes.set_ylabel(LABELS[metric])
    return figure


def knockouts(results: Results) -> Figure:
    """How the metric changes without a branch: a row for all layers, and one a layer."""
    part, metric = results["knockouts"], results["metric"]
    layers = list(dict.fromkeys(row["layer"] for row in part["rows"]))
    branches = list(dict.fromkeys(row["branch"] for row in part["rows"]))
    change = np.array([row["change"] for row in part["rows"]]).reshape(len(layers), len(branches))
    figure, axes = sheet((5.2, 1.4 + 0.36 * len(layers)))
    largest = float(np.abs(change[1:]).max()) or 1.0  # of one layer: that of all dwarfs it
    axes.imshow(change, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for (down, across), value in np.ndenumerate(change):
        colour = "white" if abs(value) > 0.6 * largest else "black"
        axes.text(across, down, f"{value:+.3f}", ha="center", va="center", color=colour, fontsize=9)
    axes.axhline(0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(branches)), branches)
    names = ["all layers" if layer is None else f"layer {layer}" for layer in layers]
    axes.set_yticks(range(len(layers)), names)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    title = f"change of {LABELS[metric]} without a branch ({part[metric]:.3f} with all)"
    axes.set_title(title, fontsize=10)
    return figure


def selection(results: Results) -> Figure:
    """The metric against n, a curve for each way to select."""
    part, metric = results["selection"], results["metric"]
    figure, axes = sheet((6.4, 4.2))
    for name, colour in COLOURS.items():
        rows = [row for row in part["rows"] if row["selection"] == name]
        n, values = [row["n"] for row in rows], [row[metric] for row in rows]
        axes.plot(n, values, color=colour, marker="o", linewidth=2, label=name)
    for n in part["trained_n"]:
        axes.axvline(n, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["n"] for row in part["rows"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("n, blocks that a query keeps (dotted: in training)")
    axes.set_ylabel(LABELS[metric])
    axes.legend(frameon=False)
    return figure


def passkey(results: Results) -> Figure:
    """The share of digits found: depth down, length across."""
    rows = results["passkey"]["rows"]
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    share = np.zeros((len(depths), len(lengths)))
    for row in rows:
        share[depths.index(row["depth"]), lengths.index(row["length"])] = row["accuracy"]
    figure, axes = sheet((1.8 + 0.9 * len(lengths), 3.6))
    axes.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (down, across), value in np.ndenumerate(share):
        colour = "white" if value < 0.6 else "black"
        axes.text(across, down, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_xlabel("tokens of text")
    axes.set_ylabel("depth of the number")
    axes.set_title("share of digits found (chance: 0.10)", fontsize=10)
    return figure


def sheet(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


PICTURES: dict[str, Callable[[Results], Figure]] = {
    "positions": positions,
    "knockouts": knockouts,
    "selection": selection,
    "passkey": passkey,
}
