"""What the lines and colours of the picture mean: palette, legend and the words around the panels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shardwise.profiling import PhaseSpan, Timeline
from shardwise.report.comparison import Run, counted_ranks, model_name
from shardwise.report.timelines import LOAD_PHASES, STEP_PHASE

# Okabe and Ito, "Color universal design" (2008): told apart under the common colour-vision deficiencies.
RANK_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OTHERS_COLOUR: Final = "#56B4E9"
NODE_COLOUR: Final = "#222222"
NODE_DASHES: Final = (0, (4, 2))
_PHASE_COLOURS: Final = {
    "from_pretrained": "#D6E6F4",
    "optimizer": "#F0C75E",
    "wrap_model": "#E4F0DC",
    "step": "#EDE4F3",
}
SHARD_COLOUR: Final = "#7B1FA2"
SHARD_WIDTH: Final = 1.0  # points
_STEP_NOTE: Final = (
    "The training step ran after the comparison, which gathers every tensor and runs the model: its start holds what that left "
    "in memory, above the value after the imports. It has scales of its own."
)
_SMALLEST_TITLE_POINTS: Final = 9
_TITLE_MARGIN_PIXELS: Final = 20
_NOTE_LETTERS: Final = 150  # per line of the footnote
_OTHER_PHASE_COLOUR: Final = "#E6E6E6"
_PHASE_WORDS: Final = {
    "from_pretrained": "from_pretrained: build the model, read weights",
    "optimizer": "optimizer: create it",
    "wrap_model": "wrap_model: shard the model",
}


def rank_colour(rank: int, world_size: int) -> str:
    """Return a rank's colour: its own among few ranks, else one for rank 0 and one for the others."""
    if world_size <= len(RANK_COLOURS):
        return RANK_COLOURS[rank]
    return RANK_COLOURS[0] if rank == 0 else _OTHERS_COLOUR


def together_label(run: Run) -> str:
    """Return what the dashed line sums over."""
    return "all ranks together" if len(run.nodes) <= 1 else "ranks of the fullest node together"


def rank_width(rank: int, world_size: int) -> float:
    """Return the width of a rank's line in points."""
    # Ranks often do the same: wider lines below narrower ones keep all of them in sight.
    return 1.3 + 0.6 * rank if world_size <= len(RANK_COLOURS) else 1.3


def phase_colour(name: str) -> str:
    """Return the colour that shades a phase."""
    return _PHASE_COLOURS.get(name, _OTHER_PHASE_COLOUR)


def shaded_phases(timelines: Sequence[Timeline]) -> list[tuple[float, PhaseSpan]]:
    """Return the phases of the lowest rank that are worth a colour, with their start on the panel's axis."""
    if not timelines:
        return []
    first = timelines[0]
    offset = first.started_at_seconds - min(line.started_at_seconds for line in timelines)
    shown = [span for span in first.phases if span.name in (*LOAD_PHASES, STEP_PHASE)]
    shown = shown or [span for span in first.phases if span.depth == 0]
    # Two layers may name the same phase, one inside the other: the outer one stands for both.
    outer: list[PhaseSpan] = []
    for span in shown:
        if not any(o.name == span.name and o.stop_seconds >= span.stop_seconds for o in outer):
            outer.append(span)
    return [(span.start_seconds + offset, span) for span in outer]


def draw_words(figure: Any, *, comparison: Mapping[str, Any], runs: Sequence[Run], first: Any) -> None:
    """Draw title, legend and footnote.

    Args:
        figure: A matplotlib figure.
        comparison: The document that is drawn.
        runs: Its runs.
        first: The upper left panel, with whose left edge the words are aligned.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ranks = max(run.world_size for run in runs)
    inches = figure.get_figheight()
    left = first.get_position().x0
    counted = counted_ranks(comparison, runs)
    title = figure.text(
        left,
        1 - 0.32 / inches,
        f"Memory while loading and sharding {model_name(comparison)}{counted and ' on '}{counted}",
        fontsize=14,
        fontweight="bold",
        va="center",
        parse_math=False,
    )
    _shrink_to_fit(figure, title)
    several = ranks > len(RANK_COLOURS)
    each: list[Any] = [
        Line2D([], [], color=rank_colour(rank, ranks), linewidth=2.5, label=f"rank {rank}")
        for rank in range(1 if several else ranks)
    ]
    if several:
        each.append(Line2D([], [], color=_OTHERS_COLOUR, linewidth=2.5, label=f"ranks 1 to {ranks - 1}"))
    together = max((together_label(run) for run in runs), key=len)
    peak: dict[str, Any] = {
        "marker": "o",
        "markerfacecolor": "white",
        "linestyle": "none",
        "markeredgecolor": "#555555",
    }
    lines = [
        Line2D([], [], color=NODE_COLOUR, linewidth=1.2, linestyle=NODE_DASHES, label=together),
        Line2D(
            [], [], color=SHARD_COLOUR, linewidth=SHARD_WIDTH, label="shard: what one rank keeps in the end"
        ),
        Line2D([], [], **peak, label="highest of one rank while loading"),
    ]
    names = dict.fromkeys(span.name for run in runs for _, span in shaded_phases(run.timelines))
    patches = [Patch(facecolor=phase_colour(name), label=_PHASE_WORDS.get(name, name)) for name in names]
    for handles, below_top in ((each, 0.66), (lines, 0.92), (patches, 1.18)):
        figure.legend(
            handles=handles,
            loc="center left",
            bbox_to_anchor=(left - 0.06 / figure.get_figwidth(), 1 - below_top / inches),
            ncols=max(1, len(handles)),
            frameon=False,
            fontsize=9,
            borderaxespad=0.0,
            borderpad=0.0,
            columnspacing=1.5,
            handlelength=1.6,
            handletextpad=0.5,
        )
    measures = dict.fromkeys(line.measures for run in runs for line in run.timelines)
    notes = [
        "Lines: anonymous memory of each rank (what the process itself has written; not the pages of mapped files) "
        "above its value after the imports.",
        "Shard: parameters and buffers of the rank that keeps the most. Shading: what rank 0 is doing. "
        "Panels below each other share their scales.",
        *(textwrap.wrap(_STEP_NOTE, _NOTE_LETTERS) if any(run.step_timelines for run in runs) else []),
        *(line for text in measures for line in textwrap.wrap(f"Measured: {text}.", _NOTE_LETTERS)),
    ]
    figure.text(
        left, 0.12 / inches, "\n".join(notes), fontsize=8, color="#444444", va="bottom", linespacing=1.35
    )


def _shrink_to_fit(figure: Any, title: Any) -> None:
    """Make a title of a long name smaller; one that is too long all the same ends in an ellipsis."""

    def room() -> float:
        # In pixels. Widths of letters grow in jumps, so that it cannot be computed from the size.
        return float(figure.bbox.width - _TITLE_MARGIN_PIXELS - title.get_window_extent().x1)

    while room() < 0 and title.get_fontsize() > _SMALLEST_TITLE_POINTS:
        title.set_fontsize(title.get_fontsize() - 1)
    while room() < 0:
        title.set_text(title.get_text().removesuffix("\u2026")[:-5] + "\u2026")
