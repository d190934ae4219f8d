"""Writes PARITY.md, the measured errors of every cell of ``tests/ops/parity.py``: python -m tests.ops.parity_table"""

from __future__ import annotations

import platform
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from maestro_fast.ops import PROFILES, PolicyLossConfig
from tests.ops.parity import BETA, PEERS, VARIANTS, run_cell

FILE = Path(__file__).with_name("PARITY.md")

INTRODUCTION = """\
# Parity of loss variants and advantage profiles

Written by `python -m tests.ops.parity_table`; the tests are in `test_variant_profile_parity.py`.

Each cell takes rewards to advantages to the loss, once with `group_advantages` and `policy_loss` in float64, once with
the peer's advantages in TRL's own `GRPOTrainer._compute_loss`. It shows the relative error of the **value** / that of
the **gradient** of the log-probs (and of the entropies, with an entropy bonus): its worst element over the largest.

Each cell has a second test: the gradients of log-probs, entropies and weights against finite differences in float64
(for cispo's log-probs, whose gradient is not that of the value, against the gradient written out).
"""

NOTES = f"""\
* `maestro` has the KL in the score: its "k3 KL" cell subtracts {BETA} KL there, and has none in the loss.
* Errors of about 1e-8 and more are the peers' float32: TRL's count / (count - 1) in a standard deviation, verl's
  1 + eps of a singleton, and the rewards and weights of verl's gdpo.
* `dapo`, and cispo with it, divide by the tokens of an optimiser step that is larger than the batch.
* Groups of identical rewards are left out: there ours is exactly 0, and peers return amplified rounding noise.
"""


def table() -> str:
    header = ["variant", *(f"`{profile}`" for profile in PROFILES)]
    rows = [[variant, *(_cell(variant, profile) for profile in PROFILES)] for variant in VARIANTS]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "numpy"))
    return "\n".join(
        [
            INTRODUCTION,
            _markdown(header, rows),
            "",
            NOTES,
            "## Profiles",
            "",
            _markdown(["profile", "peer of its advantages", "inputs", "tolerance"], _profile_rows()),
            "",
            "## Variants",
            "",
            f"The peer of each is TRL's `_compute_loss`. Measured with Python {platform.python_version()}, {versions}.",
            "",
            _markdown(["variant", "PolicyLossConfig"], [[name, _options(x)] for name, x in VARIANTS.items()]),
            "",
        ]
    )


def cells_of(text: str) -> set[tuple[str, str]]:
    """The (variant, profile) pairs for which the first table of the text shows two errors."""
    is_row = [line.startswith("|") for line in text.splitlines()]
    start = is_row.index(True)
    lines = text.splitlines()[start : is_row.index(False, start)]
    (_, *profiles), _, *rows = ([x.strip(" `") for x in line.strip("|").split("|")] for line in lines)
    return {
        (variant, profile)
        for variant, *cells in rows
        for profile, cell in zip(profiles, cells, strict=True)
        if len([float(error) for error in cell.split("/")]) == 2
    }


def _cell(variant: str, profile: str) -> str:
    errors = run_cell(variant, profile).errors
    return f"{_digits(errors.value)} / {_digits(errors.gradient)}"


def _digits(error: float) -> str:
    """One digit and an exponent: 3e-16."""
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-")


def _profile_rows() -> list[list[str]]:
    rows = []
    for profile, peer in PEERS.items():
        inputs = "groups of 4, abstained rewards"
        if profile == "maestro":
            inputs = "groups of 4 in no order, abstained rewards, weights per response"
        elif profile.startswith("verl_"):
            inputs = "ragged groups in no order, two of them of one response"
        rows.append([f"`{profile}`", peer.name, inputs, _digits(peer.rtol)])
    return rows


def _options(config: PolicyLossConfig) -> str:
    """The options that are not the default, and the normalization."""
    default = PolicyLossConfig()
    names = [x.name for x in fields(config) if getattr(config, x.name) != getattr(default, x.name)]
    if "normalization" not in names:
        names.insert(0, "normalization")
    return ", ".join(f"`{name}={getattr(config, name)!r}`" for name in names)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table with its columns aligned, so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines)


if __name__ == "__main__":
    FILE.write_text(table())
    print(FILE)
