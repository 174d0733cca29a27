"""The pictures of `AttentionProbe`, from the rows of its heads.csv alone."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from callbacks.csv_logger import Row

SHARE = (0.0, 1.0)  # of a colour scale; None: from 0 to the largest value
HEAT_MAPS: tuple[tuple[str, str, tuple[float, float] | None], ...] = (
    ("gate_compressed", "gate: compressed", SHARE),
    ("gate_selected", "gate: selected", SHARE),
    ("gate_sliding", "gate: sliding", SHARE),
    ("mass_visible", "attention mass: visible", SHARE),
    ("mass_kept", "attention mass: kept blocks", SHARE),
    ("share_compressed", "share of the output: compressed", SHARE),
    ("share_selected", "share of the output: selected", SHARE),
    ("share_sliding", "share of the output: sliding", SHARE),
    ("recall", "recall of the oracle's picks", SHARE),
    ("evidence_kept", "questions whose answer is kept", SHARE),
    ("picks_in_window", "picks wasted on the window", SHARE),
    ("overlap_neighbours", "overlap of picks: next query", SHARE),
    ("overlap_heads", "overlap of picks: other KV heads", SHARE),
    ("distinct_16", "distinct blocks of 16 queries", None),
    ("distinct_64", "distinct blocks of 64 queries", None),
    ("distance", "distance of picks, tokens", None),
)
COLUMNS = 5
MAX_LABELLED = 64  # cells of a heat map whose values are written into it
BLUE, ORANGE, GREEN, RED, GREY = "#35618f", "#e08a2e", "#4c9a5f", "#c2452d", "#8c8c8c"
CURVES: tuple[tuple[str, dict[str, tuple[str, str]]], ...] = (  # title; figure: label, colour
    ("mean gate", {
        "gate_compressed": ("compressed", BLUE),
        "gate_selected": ("selected", RED),
        "gate_sliding": ("sliding", GREEN),
    }),
    ("share of the output's norm", {
        "share_compressed": ("compressed", BLUE),
        "share_selected": ("selected", RED),
        "share_sliding": ("sliding", GREEN),
    }),
    ("attention mass of the kept blocks", {
        "mass_oracle": ("best blocks (oracle)", GREEN),
        "mass_kept": ("kept", RED),
        "mass_recent": ("latest blocks", BLUE),
        "mass_random": ("random blocks", GREY),
    }),
    ("recall of the oracle's picks", {
        "recall": ("picked", RED),
        "recall_random": ("random", GREY),
    }),
    ("questions whose answer is kept", {
        "evidence_kept": ("kept", RED),
        "evidence_random": ("random picks", GREY),
    }),
    ("overlap of picks (Jaccard)", {
        "overlap_neighbours": ("with the next query", RED),
        "overlap_heads": ("with other KV heads", BLUE),
    }),
    ("inside the window", {
        "kept_in_window": ("of kept blocks", BLUE),
        "picks_in_window": ("of picks: wasted", RED),
    }),
    ("distinct blocks kept by neighbours", {
        "distinct_64": ("64 queries", RED),
        "distinct_32": ("32 queries", ORANGE),
        "distinct_16": ("16 queries", BLUE),
    }),
    ("gradient norm", {
        "grad_layer": ("whole layer", GREY),
        "grad_compress_keys": ("φ of keys", RED),
        "grad_compress_values": ("φ of values", BLUE),
    }),
)  # fmt: skip
ON_LOG_SCALE = "grad_"
BEYOND = "picks_beyond_"


def heads(rows: Sequence[Row]) -> Figure:
    """A heat map for each figure at the latest step: a row a layer, a column a head."""
    step = max(int(row["step"]) for row in rows)
    latest = [row for row in rows if int(row["step"]) == step]
    shown = [each for each in HEAT_MAPS if any(each[0] in row for row in latest)]
    layers = sorted({int(row["layer"]) for row in latest})
    num_heads = max(int(row["head"]) for row in latest) + 1
    down = math.ceil(len(shown) / COLUMNS)
    size = (COLUMNS * max(2.6, 0.36 * num_heads + 0.9), down * max(2.0, 0.3 * len(layers) + 0.9))
    figure = Figure(figsize=size)
    figure.subplots_adjust(0.025, 0.3 / size[1], 0.995, 1 - 0.55 / size[1], wspace=0.12, hspace=0.3)
    grid = figure.subplots(down, COLUMNS, squeeze=False).flat
    for axes, (name, title, scale) in zip(grid, shown, strict=False):
        heat_map(axes, table(latest, name, layers, num_heads), layers, scale)
        axes.set_title(title, fontsize=9)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.suptitle(f"layers (down) and heads (across) after {step:,} steps", fontsize=11, y=0.99)
    return figure


def table(rows: Sequence[Row], name: str, layers: list[int], num_heads: int) -> np.ndarray:
    """[layers, heads], NaN where there is no figure."""
    values = np.full((len(layers), num_heads), np.nan)
    for row in rows:
        if name in row:
            values[layers.index(int(row["layer"])), int(row["head"])] = float(row[name])
    return values


def heat_map(
    axes: Axes, values: np.ndarray, layers: list[int], scale: tuple[float, float] | None
) -> None:
    """Grey cells have no figure; the values stand in the cells if there is room for them."""
    low, high = scale or (0.0, float(np.nanmax(values)) or 1.0)
    colours = colormaps["viridis"].with_extremes(bad="#e6e6e6")
    image = axes.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.tick_params(labelsize=7, length=0)
    if values.size > MAX_LABELLED:
        axes.figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
        return
    for (down, across), value in np.ndenumerate(values):
        if math.isfinite(value):
            text = f"{value:.2f}" if scale else f"{value:.3g}"
            colour = "black" if value > low + 0.6 * (high - low) else "white"
            axes.text(across, down, text, ha="center", va="center", fontsize=7, color=colour)


def curves(rows: Sequence[Row]) -> Figure:
    """Means over all layers against steps, single layers thin; and how far picks reach now."""
    shown = [each for each in CURVES if any(name in row for row in rows for name in each[1])]
    down = math.ceil((len(shown) + 1) / 3)
    figure = Figure(figsize=(12.6, 3.1 * down))  # no constrained layout: it takes most of the time
    figure.subplots_adjust(0.04, 0.15 / down, 0.985, 1 - 0.21 / down, wspace=0.17, hspace=0.33)
    grid = figure.subplots(down, 3).flat
    for axes, (title, named) in zip(grid, shown, strict=False):
        for name, (label, colour) in named.items():
            over_steps(axes, rows, name, label, colour)
        axes.set_title(title, fontsize=10)
        if not axes.lines:
            axes.set_visible(False)
            continue
        axes.legend(frameon=False, fontsize=8)
        if axes.get_yscale() == "linear":
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    reach_of_picks(grid[len(shown)], rows)
    for axes in grid[len(shown) + 1 :]:
        axes.set_visible(False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("bold: mean of all layers; thin: each layer", fontsize=11, y=0.99)
    return figure


def over_steps(axes: Axes, rows: Sequence[Row], name: str, label: str, colour: str) -> None:
    """One figure: its mean bold, its layers thin; nothing where there is none."""
    of_layers = by_layer(rows, name)
    if not of_layers:
        return
    together: defaultdict[int, list[float]] = defaultdict(list)
    for means in of_layers.values():
        if len(of_layers) > 1:
            axes.plot(list(means), list(means.values()), color=colour, alpha=0.3, linewidth=0.8)
        for step, value in means.items():
            together[step].append(value)
    mean = [sum(values) / len(values) for values in together.values()]
    axes.plot(
        list(together), mean, color=colour, linewidth=2, marker="o", markersize=3, label=label
    )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("optimizer steps", fontsize=8)
    if name.startswith(ON_LOG_SCALE):
        axes.set_yscale("log")


def by_layer(rows: Sequence[Row], name: str) -> dict[int, dict[int, float]]:
    """Layer -> step -> mean over its heads, steps in order."""
    found: defaultdict[int, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: int(row["step"])):
        if name in row:
            found[int(row["layer"])][int(row["step"])].append(float(row[name]))
    return {
        layer: {step: sum(values) / len(values) for step, values in steps.items()}
        for layer, steps in sorted(found.items())
    }


def reach_of_picks(axes: Axes, rows: Sequence[Row]) -> None:
    """The share of picks at a distance or beyond, of each layer at the latest step."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(BEYOND))
    distances = sorted(int(name.removeprefix(BEYOND)) for name in names)
    at_distance = [by_layer(rows, f"{BEYOND}{distance}") for distance in distances]
    layers = sorted({layer for means in at_distance for layer in means})
    if not layers:
        axes.set_visible(False)
        return
    colours: Any = colormaps["viridis"]
    for place, layer in enumerate(layers):
        last = [[*means[layer].values()][-1] if layer in means else 0.0 for means in at_distance]
        colour = colours(place / max(1, len(layers) - 1) * 0.9)
        axes.plot(distances, last, color=colour, marker="o", markersize=3, label=f"layer {layer}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, [f"{distance:,}" for distance in distances])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_title("share of picks this far away or farther", fontsize=10)
    axes.set_xlabel("distance in tokens", fontsize=8)
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(layers) // 7)
