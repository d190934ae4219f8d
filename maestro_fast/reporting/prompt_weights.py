"""Shows the weights that a saved Conductor gives prompts: in tables, in a sentence on families, and in a picture."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from maestro_fast.data.config import DataConfig
from maestro_fast.data.load import load_prompts
from maestro_fast.reporting.figure import DPI, INK, REWARD_COLOURS, WIDTH, require_matplotlib, short
from maestro_fast.reporting.history import History
from maestro_fast.reporting.json_lines import METRICS_FILE, iter_jsonl
from maestro_fast.reporting.tables import Cell, Table, format_table
from maestro_fast.training.prompt_weights import PromptWeights, load_conductor, prompt_weights
from maestro_fast.weighting import Anchored
from maestro_fast.weighting.families import spread_between_families
from maestro_fast.weighting.policy import entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHUFFLES = 1000
LATE = 20  # the number of logged steps over which the residual's share is averaged
NO_FAMILY = "(no family)"
ENTROPY = "H (nats)"  # The column is not called entropy, because a reward may have that name.


def show_conductor(
    folder: Path,
    data: DataConfig,
    *,
    out: Path,
    rows: int,
    model: str | None = None,
    samples: int = 4,
    seed: int = 0,
) -> str:
    """Draws the picture, and returns the text to print.

    Args:
        folder: The saved Conductor, see ``load_conductor``.
        data: The prompts.
        out: The file to which the picture is written.
        rows: The largest number of rows in the table of prompts.
        model: The model whose states the Conductor reads, see ``prompt_weights``.
        samples: The number of responses that are sampled for each prompt if the Conductor reads responses.
        seed: The seed of this sampling.

    Raises:
        ValueError, FileNotFoundError: See ``load_conductor``, ``load_prompts`` and ``prompt_weights``.
    """
    require_matplotlib()
    saved = load_conductor(folder)
    try:
        dataset = load_prompts(data, None if saved.run is None else saved.run.chat)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"--on: {str(error).removeprefix('data.')}") from error
    found = prompt_weights(saved, dataset, model=model, samples=samples, seed=seed)
    prompt_picture(found).savefig(out, dpi=DPI)
    width = min(shutil.get_terminal_size((100, 24)).columns, 160)
    tables = [prompt_table(found, rows=rows, width=width), family_table(found)]
    parts = [format_table(table, width) for table in tables if table is not None]
    residual = isinstance(saved.inner, Anchored) and saved.inner.config.residual
    beside = residual_sentence(saved.folder.absolute().parent / METRICS_FILE) if residual else None
    sentences = [f"{found.policy} in {saved.folder}.", *found.source, spread_sentence(found), beside]
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)  # Paths are not broken.
    lines = [wrapper.fill(sentence) for sentence in sentences if sentence]
    return "\n\n".join([*parts, "\n".join([*lines, f"Picture: {out}"])])


def prompt_table(found: PromptWeights, *, rows: int, width: int) -> Table:
    """The weights and their entropy for at most ``rows`` prompts, about as many of each family.

    Prompts are shortened so that a row fits into one line of ``width`` characters, if the rewards leave room for that.
    """
    kept = _evenly(found.families, rows)
    names = found.reward_names
    has_families = any(found.families)
    taken = sum(max(5, len(name)) + 2 for name in [*names, ENTROPY])
    if has_families:
        taken += 2 + min(12, max(len(family) for family in found.families))
    entropy_N = entropy(found.weights_NK)
    room = max(24, width - taken)
    body: list[tuple[Cell, ...]] = []
    for i in kept:
        text = textwrap.shorten(found.prompts[i], room, placeholder=" …") or short(found.prompts[i], room)
        family: tuple[Cell, ...] = (found.families[i] or NO_FAMILY,) if has_families else ()
        body.append((text, *family, *found.weights_NK[i].tolist(), entropy_N[i].item()))
    of = f"{len(kept)} of {len(found.prompts)} prompts" if len(kept) < len(found.prompts) else f"{len(kept)} prompts"
    caption = f"Weights of {of}, and their entropy H, {math.log(len(names)):.3f} for equal weights"
    return Table(caption, ("prompt", *(["family"] if has_families else []), *names, ENTROPY), tuple(body))


def family_table(found: PromptWeights) -> Table | None:
    """The mean weights and entropy of each family and of all prompts, or None if the data name no family."""
    if not any(found.families):
        return None
    entropy_N = entropy(found.weights_NK)
    body: list[tuple[Cell, ...]] = []
    for family in [*sorted(set(found.families)), None]:
        rows = [i for i, own in enumerate(found.families) if family is None or own == family]
        label = "all" if family is None else family or NO_FAMILY
        body.append((label, len(rows), *found.weights_NK[rows].mean(0).tolist(), entropy_N[rows].mean().item()))
    return Table("Mean weights by family", ("family", "prompts", *found.reward_names, ENTROPY), tuple(body))


def spread_sentence(found: PromptWeights) -> str | None:
    """Says whether the families' weights lie further apart than by chance; None for fewer than two families."""
    measured = spread_between_families(found.weights_NK, found.families, shuffles=SHUFFLES, seed=0)
    if measured is None:
        return None
    spread, chance = measured
    top = chance.quantile(0.95).item()
    # Equal weights differ in their last bits, so a tiny spread counts as none.
    verdict = "beyond chance" if spread > max(top, 1e-6) else "NOT beyond chance"
    return (
        f"Spread between families (root of the summed variances of their means): {spread:.4f}; with the families "
        f"shuffled among the prompts {chance.mean().item():.4f}, below {top:.4f} in 95 % of {SHUFFLES:,} shuffles: "
        f"{verdict}."
    )


def residual_sentence(metrics: Path) -> str:
    """Says how much of the scores a learnt residual makes beside the weights, by the log ``metrics`` of the run.

    That depends on rewards, which a table of prompts does not have.
    """
    if metrics.is_file():
        shares = History.of(iter_jsonl(metrics)).get("conductor/residual_share")
        late = shares[np.isfinite(shares)][-LATE:]
        if len(late):
            return (
                f"Residual: a learnt reward beside these weights made {late.mean():.0%} of the scores' variance within "
                f"groups, the weights the rest (mean of the last {len(late)} logged steps that had one)."
            )
    return (
        "Residual: a learnt reward stands beside these weights. Its share of the scores depends on the rewards; "
        f"{metrics} does not have it (conductor/residual_share)."
    )


def prompt_picture(found: PromptWeights) -> Figure:
    """Draws a heat map with a row for each prompt, ordered by family, and beside it the mean weights of each family.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = sorted(range(len(found.families)), key=lambda i: found.families[i])
    families = [found.families[i] for i in order]
    known = sorted(set(families))
    means_FK = torch.stack([found.weights_NK[[i for i in order if found.families[i] == f]].mean(0) for f in known])
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    equal = 1 / len(found.reward_names)
    high = max(found.weights_NK.max().item(), 2 * equal)  # so that equal weights have at most the middle colour
    colours = {"cmap": "Blues", "vmin": 0.0, "vmax": high}
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    image = left.imshow(found.weights_NK[order].numpy(), aspect="auto", interpolation="nearest", **colours)
    left.set_title(f"Each of {len(order):,} prompts", fontsize=10, loc="left", color=INK)
    _bands(left, families, known)
    left.set_ylabel("prompt, by family" if any(known) else "prompt", fontsize=9)
    right.imshow(means_FK.numpy(), aspect="auto", **colours)
    right.set_title("Mean of each family" if any(known) else "Mean", fontsize=10, loc="left", color=INK)
    right.set_yticks(range(len(known)), [short(family or NO_FAMILY, 14) for family in known], fontsize=9)
    for f, row in enumerate(means_FK.tolist()):
        for k, value in enumerate(row):
            colour = "white" if value > 0.6 * high else INK
            right.text(k, f, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    for ax in (left, right):
        ax.set_xticks(
            range(len(found.reward_names)), [short(n, 16) for n in found.reward_names], rotation=35, ha="right"
        )
        ax.tick_params(labelsize=9, colors=INK, length=3)
        ax.set_xlabel("reward", fontsize=9)
    bar = figure.colorbar(image, ax=[left, right], fraction=0.04, pad=0.01)
    bar.set_label(f"weight (a row's sum is 1; dashed: equal, {equal:.3f})", fontsize=9)
    bar.ax.axhline(equal, color=REWARD_COLOURS[1], linestyle=(0, (3, 2)), linewidth=1.5)
    bar.ax.tick_params(labelsize=9)
    return figure


def _bands(ax: Axes, families: Sequence[str], known: Sequence[str]) -> None:
    """Writes each family's name beside the middle of its rows, and draws a line between neighbouring families."""
    if not any(known):
        return
    starts = [families.index(family) for family in known]
    ends = [*starts[1:], len(families)]
    middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
    ax.set_yticks(middles, [short(family or NO_FAMILY, 14) for family in known], rotation=90, va="center")
    for start in starts[1:]:
        ax.axhline(start - 0.5, color=INK, linewidth=0.8)


def _evenly(families: Sequence[str], limit: int) -> list[int]:
    """The indices of at most ``limit`` prompts. They are taken from each family in turn, and sorted by family."""
    groups = [[i for i, own in enumerate(families) if own == family] for family in sorted(set(families))]
    turns = [group[turn] for turn in range(max(map(len, groups))) for group in groups if turn < len(group)]
    return sorted(turns[:limit], key=lambda i: (families[i], i))
