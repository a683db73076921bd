"""Draw docs/images/context_parallel.png: who holds which token under context parallelism, and who attends what.

`python docs/draw_context_parallel.py [FILE]`. What stock attention sees is the arithmetic that
tests/unit/attention/test_attention.py checks.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.unit.attention.test_attention import stock_keys, stock_wrong_share  # noqa: E402

CUTS, CP = [0, 12, 16, 32], 2
S = CUTS[-1]
SIZE = S // (2 * CP)
DOCUMENTS = ["#9fb4c7", "#d8c27a", "#a9c29b"]
RANKS = ["#2f6690", "#d9541e"]
RIGHT, MISSING, OTHER, FUTURE = "#c4ccd4", "#f3d9a4", "#8d5a97", "#c1121f"
TEXT = "#2b2f36"


def rank_of(token: int) -> int:
    chunk = token // SIZE
    return min(chunk, 2 * CP - 1 - chunk)


def document_of(token: int) -> int:
    return sum(token >= cut for cut in CUTS[1:])


def allowed(query: int, key: int) -> bool:
    return key <= query and document_of(query) == document_of(key)


def box(axes: Any, x: float, y: float, width: float, height: float, color: str, text: str = "", **more: Any) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **{"edgecolor": "white", "linewidth": 1.0} | more))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=11)


def draw_batch(axes: Any) -> None:
    """The sample, its chunks, and what each rank's slots hold and are taken for."""
    axes.set_xlim(-7.5, S + 0.2)
    axes.set_ylim(-2.2, 4.5)
    axes.axis("off")
    for (a, b), color, name in zip(pairwise(CUTS), DOCUMENTS, "ABC"):
        axes.text((a + b) / 2, 4.05, f"document {name}", ha="center", va="center", color=TEXT, fontsize=11)
        for token in range(a, b):
            box(axes, token, 2.7, 1, 0.95, color)
    for chunk in range(2 * CP):
        rank = min(chunk, 2 * CP - 1 - chunk)
        box(axes, chunk * SIZE, 1.75, SIZE, 0.85, RANKS[rank], f"chunk {chunk}, rank {rank}")
    axes.text(-0.4, 2.7, "a sample, cut into\n2 x cp chunks", ha="right", va="center", color=TEXT, fontsize=11)
    for rank in range(CP):
        y = 0.15 - 1.55 * rank
        tokens = [t for t in range(S) if rank_of(t) == rank]
        axes.text(-0.4, y + 0.05, f"slots of rank {rank}", ha="right", va="center", color=RANKS[rank], fontsize=11)
        for slot, token in enumerate(tokens):
            box(axes, slot, y, 1, 0.8, DOCUMENTS[document_of(token)])
        for a, b in pairwise(CUTS):
            box(axes, a // CP, y - 0.5, (b - a) // CP, 0.4, DOCUMENTS[document_of(a)], hatch="////")
    note = "above: the document a token is of\nhatched: the one that stock thd attention takes it for,\n"
    note += "since it splits every document over all ranks by itself"
    axes.text(S // CP + 0.6, -0.55, note, ha="left", va="center", color=TEXT, fontsize=11)


def draw_squares(axes: Any, colors: np.ndarray, title: str) -> None:
    """A query x key picture of colors [S, S] ("" is empty), with the chunks' lines."""
    image = np.array([[matplotlib.colors.to_rgb(c or "white") for c in row] for row in colors])
    axes.imshow(image, extent=(0, S, S, 0), interpolation="nearest")
    for chunk in range(2 * CP + 1):
        for line in (axes.axhline, axes.axvline):
            line(chunk * SIZE, color="#e3e6ea", linewidth=0.8, zorder=1)
    axes.set_title(title, fontsize=12, color=TEXT, pad=8)
    middles = [(a + b) / 2 for a, b in pairwise(CUTS)]
    axes.set_xticks(middles, list("ABC"))
    axes.set_yticks(middles, list("ABC"))
    axes.tick_params(length=0, colors=TEXT)
    axes.set_xlabel("keys", color=TEXT)
    for spine in axes.spines.values():
        spine.set_color("#b9c0c8")


def stock_colors() -> np.ndarray:
    seen = stock_keys(CUTS, CP)

    def color(query: int, key: int) -> str:
        if key in seen[query]:
            return RIGHT if allowed(query, key) else FUTURE if key > query else OTHER
        return MISSING if allowed(query, key) else ""

    return np.array([[color(q, k) for k in range(S)] for q in range(S)], dtype=object)


def rank_colors(rank: int | None) -> np.ndarray:
    """The right pairs, all in a rank's color, or each in the color of the rank that holds the query."""
    return np.array(
        [[RANKS[rank_of(q) if rank is None else rank] if allowed(q, k) else "" for k in range(S)] for q in range(S)],
        dtype=object,
    )


def main(path: str) -> None:
    figure = Figure(figsize=(13.5, 8.3), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)  # type: ignore[union-attr]
    figure.suptitle(
        f"One sample of three documents on {CP} context-parallel ranks", fontsize=15, color=TEXT, x=0.01, ha="left"
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.9, 1.2])
    draw_batch(top.subplots())
    stock, gather, *ulysses = bottom.subplots(1, 4, width_ratios=[1, 1, 1, 1])

    wrong, future = stock_wrong_share(CUTS, CP)
    draw_squares(
        stock,
        stock_colors(),
        f"stock thd: {wrong:.0%} of the queries see\nwrong keys, {future:.0%} future tokens",
    )
    stock.set_ylabel("queries", color=TEXT)
    pairs = [sum(allowed(q, k) for q in range(S) if rank_of(q) == rank for k in range(S)) for rank in range(CP)]
    draw_squares(
        gather,
        rank_colors(None),
        f"gather (all_gather): own queries,\nall heads: {pairs[0]} and {pairs[1]} pairs a head",
    )
    for rank, axes in enumerate(ulysses):
        title = f"ulysses (a2a): half the heads on\nrank {rank}: {sum(pairs)} pairs a head"
        draw_squares(axes, rank_colors(rank), title)
    kinds = {"seen, rightly": RIGHT, "own document, not seen": MISSING, "another document": OTHER, "the future": FUTURE}
    kinds |= {f"computed by rank {rank}": color for rank, color in enumerate(RANKS)}
    patches = [Patch(facecolor=color, label=label) for label, color in kinds.items()]
    bottom.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=11, labelcolor=TEXT)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(HERE / "images" / "context_parallel.png"))
