"""Makes the table of targets beside measurements, which the README shows, from the raw figures in bench/results.

    python -m bench.table            prints the table
    python -m bench.table --write    puts it into README.md

``ROWS`` holds the targets. The GPU benchmarks judge their figures by the same list, so a target is changed there and
nowhere else. A new file of results is shown once ``RESULTS`` names it.

A row shows one case of one op, and all of its figures come from one record: that of the newest file which has the case,
and the last one in this file. Files without a date are older than files with one, and are ordered by ``RESULTS``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.records import Record, Source, read, record_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = (  # oldest first, as far as the files have no dates
    "gpu_second_h200.jsonl",
    "gpu_third_h200.jsonl",
    "gpu_advantages_h100.jsonl",
    "cpu.json",
    "cpu_ops.json",
)
BEGIN = "<!-- performance: made by python -m bench.table --write -->\n"
END = "<!-- end of performance -->\n"
Verdict = Literal["met", "missed", "not measured"]
COLUMNS: dict[Verdict, str] = {"met": "met", "missed": "missed: why", "not measured": "not measured: why"}
SIGNS = {"<=": "≤", ">=": "≥", "<": "<"}


@dataclass(frozen=True)
class Target:
    """What one figure of a case should be.

    Attributes:
        what: What is measured, or what ours is compared with.
        sign: "<=", ">=" or "<".
        bound: The value that the sign refers to; None if the figure is reported without a bound.
        unit: The unit. "x" says how many times as fast as ``what`` ours is, or how many times as small.
        field: The field of the figure: wall, host, graph, cold, launches, error, ...
        ours: The contender that is judged; None takes the row's.
        peer: The contender whose figure is divided by ours, or None.
        stretch: A second bound, which is a wish.
        beside: Other contenders whose figures are shown, too, and what they are called.
        why: Why ours misses the target, if it does.
        unmeasured: Why there is no figure, where the record does not say so.
    """

    what: str
    sign: Literal["<=", ">=", "<"]
    bound: float | None
    unit: str
    field: str
    ours: str | None = None
    peer: str | None = None
    stretch: float | None = None
    beside: tuple[tuple[str, str], ...] = ()
    why: str = "the cause is not known"
    unmeasured: str = "not in the file"

    def holds(self, value: float, bound: float | None) -> bool:
        """Whether a value meets a bound."""
        if bound is None:
            return True
        return value <= bound if self.sign == "<=" else value >= bound if self.sign == ">=" else value < bound


@dataclass(frozen=True)
class Row:
    """The targets of one case.

    Attributes:
        op: The op in the records.
        case: How the case begins in the records.
        title: The row's first cell.
        ours: The contender that is judged.
        targets: What its figures should be.
        unmeasured: Why no file has the case, if none has.
    """

    op: str
    case: str
    title: str
    ours: str
    targets: tuple[Target, ...]
    unmeasured: str = "not in the file"


def faster(what: str, bound: float, peer: str, field: str = "wall", **options: Any) -> Target:
    """A target for how many times as fast as a peer ours is. ``options`` are further fields of ``Target``."""
    return Target(what, ">=", bound, "x", field, peer=peer, **options)


def host(**options: Any) -> Target:
    """The target for the host's time in one call."""
    return Target("host", "<=", 25, "us", "host", why=HOST, **options)


# Reasons are in few words here. bench/README.md, the files of the kernels and those of the benchmarks explain them.
HOST = "the host is slower than the kernels"
TRL, VERL, LIGER = "TRL's chunked op", "verl's Triton kernel", "Liger's scaled cross entropy"
EAGER, COMPILED = "torch reference", "torch.compile of it"
ALONE = "triton, the launch alone"
SIZES = "V = 151936, T = 16384"
GROUP = "4,096 x 8 in groups of 16"
MEMORY = (
    Target("memory", "<=", 3 + 4e-9 * 151_936 * 4096, "GB", "GB"),  # 3 GB, and the head's gradient in float32
    Target("TRL's memory", ">=", 1, "x", "GB", peer=TRL),
)


PRECISION = 1e-5  # the largest error of a log-prob, in nats


def heads(d: int, stretch: float, peers: tuple[Target, ...], sizes: str = "", **options: Any) -> list[Row]:
    """The targets of token_logprobs for one hidden size: of the default, and of the strategy without logits."""
    case, title = f"forward, d = {d}, {SIZES}", f"`token_logprobs`, forward, d {d:,}"
    limit = "1 torch.mm, the limit"
    why = "as large as PyTorch's"
    chunked = (
        faster("`torch.mm`", 0.85, limit, stretch=stretch, why="logits go to memory"),
        *peers,
        Target("error", "<=", PRECISION, "nats", "error", beside=((EAGER, "PyTorch"),), why=why),
        Target("TRL's error", ">=", 1000, "x", "error", peer=TRL),
    )
    fused = (
        faster("`torch.mm`", 0.85, limit, stretch=stretch),
        Target("error", "<=", PRECISION, "nats", "error", beside=((EAGER, "PyTorch"),)),
    )
    return [
        Row("token_logprobs", case, title + sizes, "triton, chunked", chunked, **options),
        Row("token_logprobs", case, f'the same, `strategy="fused"`, d {d:,}', "triton, fused", fused, **options),
    ]


def small(trl: float, liger: float) -> tuple[Target, ...]:
    """What ours should be beside peers, for a small hidden size."""
    return faster("TRL", trl, TRL), faster("Liger", liger, LIGER), faster("verl", 1.6, VERL)


ROWS = [
    *heads(
        4096,
        0.92,
        (faster("verl", 1.6, VERL), faster("TRL", 1.0, TRL, stretch=1.08), faster("Liger", 0.9, LIGER)),
        sizes=", V 151,936, T 16,384",
    ),
    *heads(2048, 0.90, small(1.3, 1.0), unmeasured="not timed yet"),
    *heads(1024, 0.90, small(1.3, 1.0)),
    Row(
        "linear_policy_loss",
        f"d = 4096, {SIZES}, 0% of advantage 0",
        "`linear_policy_loss`, forward and backward, d 4,096",
        "one sweep",
        (
            faster("3 `torch.mm`", 0.85, "3 torch.mm, the limit", stretch=0.9),
            faster("TRL", 1.35, TRL, stretch=1.45),
            faster("verl", 1.8, VERL),
            faster("Liger", 1.2, "Liger's linear GRPO loss"),
            *MEMORY,
        ),
    ),
    Row(
        "linear_policy_loss",
        f"d = 4096, {SIZES}, 50% of advantage 0",
        "the same, half of the advantages 0",
        "one sweep",
        (
            Target(
                "wall",
                "<=",
                60,
                "ms",
                "ms",
                beside=(("one sweep, active", "`active`"),),
                why="rows of advantage 0 still get log-probs",
            ),
            faster("TRL", 2.1, TRL),
            *MEMORY,
        ),
    ),
    Row(
        "pool_hidden",
        "mean, B = 128, T = 65536, d = 4096",
        "`pool_hidden`, mean, 65,536 x 4,096",
        "triton",
        (
            faster(
                "copy",
                0.93,
                "torch copy of as many bytes",
                "cold",
                why="processors run dry at the end, and a second launch",
            ),
            faster("eager", 2.8, EAGER, "cold"),
        ),
    ),
    Row(
        "maestro_advantages",
        "contexts, linear, B = 512, d = 4096, K = 8",
        "`maestro_advantages`, h given, linear, 512 x 4,096",
        "triton",
        (
            Target("launches", "<=", 1, "", "launches", why="one would have to hold all of d"),
            Target("syncs", "<=", 0, "", "syncs"),
            Target("graph", "<=", 8, "us", "graph", why="6 us in the first launch"),
            host(),
            faster("eager", 30, EAGER, why=HOST),
            faster("`torch.compile`", 3, COMPILED),
        ),
    ),
    Row(
        "maestro_advantages",
        "last, MLP, B = 512, d = 4096, K = 8",
        "the same, packed states, MLP of 256",
        "triton",
        (
            Target("launches", "<=", 2, "", "launches", why="an MLP is not fused"),
            Target("syncs", "<=", 0, "", "syncs"),
            Target("graph", "<=", 15, "us", "graph", why="28 us in the MLP's first layer"),
            host(),
            faster("eager", 20, EAGER),
        ),
    ),
    Row(
        "group_advantages",
        "grpo, B = 4096, K = 8, G = 16",
        f"`group_advantages`, grpo, {GROUP}",
        "triton",
        (
            Target("launches", "<=", 1, "", "launches"),
            Target("syncs", "<=", 0, "", "syncs"),
            Target("graph", "<=", 3, "us", "graph", why="a chain of dependent instructions"),
            Target("wall", "<=", 25, "us", "wall", why=HOST),
            host(),
            faster("TRL", 12, "TRL's block"),
            faster("verl's loop", 1000, "verl's loop", unmeasured="the benchmark does not call it"),
        ),
    ),
    Row(
        "policy_loss",
        "dapo, B = 512, T = 131072",
        "`policy_loss`, dapo, 131,072 tokens, gradient, metrics",
        "triton",
        (
            Target("launches", "<=", 2, "", "launches", ours=ALONE),
            Target("launches with autograd", "<=", 2, "", "launches", why="it adds a slice and a product"),
            Target("graph", "<=", 10, "us", "graph", ours=ALONE),
            Target("graph with autograd", "<=", 10, "us", "graph"),
            host(ours=ALONE),
            faster("TRL", 20, "TRL's loss"),
            faster("`torch.compile`", 4, COMPILED),
        ),
    ),
    *(
        Row(
            "group_advantages, CPU",
            f"4096-8-{profile}-0.0",
            f"`group_advantages` in C++, one CPU thread, {profile}",
            "cpp",
            (
                Target(
                    "in a loop",
                    "<=",
                    bound,
                    "us",
                    "loop",
                    beside=(("TRL's block", "TRL"),),
                    why="the target is for an idle core",
                ),
                faster("TRL", times, "TRL's block", "loop", why="12 two days before, on such a machine"),
            ),
        )
        for profile, bound, times in (("grpo", 23, 8), ("gdpo", 35, 12))
    ),
    Row("beside_verl, CPU", "", "the same beside verl", "cpp", (faster("verl's loop", 1000, "verl's loop", "loop"),)),
    Row(
        "step",
        "",
        "the Conductor in a step, 0.6B (paper: 4 to 6.7 %)",
        "Conductor",
        (Target("share", "<", 1, "%", "share"),),
    ),
    Row(
        "conductor_share, CPU",
        "",
        "the same, quickstart on a CPU",
        "Conductor",
        (Target("share", "<", 2, "%", "share"),),
    ),
    Row(
        "shared_prefix",
        "P = 2048, R = 512, G = 8",
        "shared prompts: score and train, P 2,048, R 512, G 8",
        "shared",
        (
            Target("tokens", "<=", 2048 + 8 * 512, "", "tokens"),
            faster("packed", 2.5, "varlen", "ms"),
            Target("its memory", ">=", 1, "x", "peak", peer="varlen"),
        ),
        unmeasured="not timed on a GPU yet",
    ),
    Row(
        "trainer_step",
        "",
        "a whole step of our trainer, 0.6B, 64 x 2,048 tokens",
        "ours",
        (
            Target("sum of its GEMMs", ">=", None, "x", "ms", peer="GEMMs"),
            faster("TRL", 1.25, "TRL", "ms"),
            Target("TRL's memory", ">=", 1, "x", "peak", peer="TRL"),
        ),
        unmeasured="the trainer has run on CPUs alone",
    ),
]


# --- what the figures say ---


@dataclass(frozen=True)
class Judged:
    """A target, its figure, whether it is met, and if not, why."""

    target: Target
    value: float | None
    verdict: Verdict
    reason: str
    beside: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        """As the benchmarks print it."""
        goal = " ".join(
            filter(None, [self.target.what, self.target.sign, _number(self.target.bound), self.target.unit])
        )
        if self.value is None:
            return f"target: {goal}: {self.verdict}"
        return f"target: {goal}: {self.value:.3g}, {'MISSED' if self.verdict == 'missed' else self.verdict}"


def judge(row: Row, target: Target, record: Record | None) -> Judged:
    """Compares the target with its figure in the record of the row's case, if there is one."""
    if record is None:
        return Judged(target, None, "not measured", row.unmeasured)
    if any(note.startswith("WRONG") for note in record.notes):
        return Judged(target, None, "not measured", "a result was wrong")
    ours = target.ours or row.ours
    value = _value(record, target, ours)
    if value is None:
        return Judged(target, None, "not measured", _absence(record, target, ours))
    beside = tuple((called, x) for name, called in target.beside if (x := _value(record, target, name)) is not None)
    if target.holds(value, target.bound):
        return Judged(target, value, "met", "", beside)
    return Judged(target, value, "missed", target.why, beside)


def _value(record: Record, target: Target, ours: str) -> float | None:
    """The figure of a contender, or that of the peer divided by it."""
    own = record.figures.get(ours, {}).get(target.field)
    if target.peer is None or own is None:
        return own
    theirs = record.figures.get(target.peer, {}).get(target.field)
    return theirs / own if theirs is not None and own else None


def _absence(record: Record, target: Target, ours: str) -> str:
    """Why a record lacks a figure: what it notes about the contender, or else what the target says."""
    missing = target.peer if target.field in record.figures.get(ours, {}) and target.peer is not None else ours
    for note in record.notes:
        if note.startswith(f"{missing}: "):
            said = note.removeprefix(f"{missing}: ").removeprefix("left out, ").removeprefix("skipped, ")
            return "left out of that run" if said == "none are wanted" else said.split(":")[0]
    return target.unmeasured


def rows_of(record: Record) -> list[Row]:
    """The rows that a record is for."""
    return [row for row in ROWS if row.op == record.op and record.case.startswith(row.case)]


def judged(line: Mapping[str, Any]) -> list[Judged]:
    """The targets of a benchmark's line, compared with its figures. A dry run is not judged."""
    record = record_of(line)
    if record is None:
        return []
    return [judge(row, target, record) for row in rows_of(record) for target in row.targets]


def bound_of(op: str) -> float:
    """The bound of an op that has a single target."""
    ((target,),) = (row.targets for row in ROWS if row.op == op)
    assert target.bound is not None
    return target.bound


# --- the page ---


def markdown(records: Iterable[tuple[Source, Record]]) -> str:
    """The table, how many targets are met, and the sources of the figures. ``records`` are sorted, oldest first."""
    newest = {row.title: pair for pair in records for row in rows_of(pair[1])}
    sources: list[Source] = []
    lines, count = [], dict.fromkeys(COLUMNS, 0)
    for row in ROWS:
        source, record = newest.get(row.title, (None, None))
        found = [judge(row, target, record) for target in row.targets]
        mark = ""
        if source is not None and any(x.value is not None for x in found):
            if source not in sources:
                sources.append(source)
            mark = f" <sup>{sources.index(source) + 1}</sup>"
        for x in found:
            count[x.verdict] += 1
        cells = [_cell([x for x in found if x.verdict == verdict]) for verdict in COLUMNS]
        lines.append(f"| {row.title}{mark} | {' | '.join(cells)} |\n")
    head = f"| op and case | {' | '.join(COLUMNS.values())} |\n| --- | --- | --- | --- |\n"
    total = f"{sum(count.values())} targets: {', '.join(f'{number} {verdict}' for verdict, number in count.items())}.\n"
    notes = [f"{n}. `{x.file}`: {', '.join(filter(None, (x.facts, x.date[:10])))}\n" for n, x in enumerate(sources, 1)]
    return "".join([head, *lines, "\n", total, "\n", *notes])


def _cell(found: list[Judged]) -> str:
    """The targets of one verdict, those with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for x in found:
        by_reason.setdefault(x.reason, []).append(_item(x))
    return "<br>".join(", ".join(items) + f": {reason}" * bool(reason) for reason, items in by_reason.items())


def _item(x: Judged) -> str:
    """A target with its figure, such as "graph 3.2 us (≤ 3)", or without one, such as "TRL ≥ 12 x"."""
    target = x.target
    if target.bound is None:
        return target.what if x.value is None else f"{target.what} {_number(x.value)} {target.unit}"
    goal = f"{SIGNS[target.sign]} {_number(target.bound)}"
    if x.value is None:
        wish = f" (stretch {_number(target.stretch)})" if target.stretch is not None else ""
        return f"{target.what} {goal} {target.unit}".rstrip() + wish
    if target.stretch is not None:
        goal += f", stretch {_number(target.stretch)} {'met' if target.holds(x.value, target.stretch) else 'missed'}"
    goal += "".join(f"; {called} {_number(value)}" for called, value in x.beside)
    return f"{target.what} {_shown(x)} {target.unit}".rstrip() + f" ({goal})"


def _shown(x: Judged) -> str:
    """The figure with three digits, or with as many more as it takes to be on the same side of the bound."""
    assert x.value is not None
    for digits in range(3, 9):
        text = _number(x.value, digits)
        if x.target.holds(float(text.replace(",", "")), x.target.bound) == (x.verdict == "met"):
            break
    return text


def _number(value: float | None, digits: int = 3) -> str:
    """A number with some significant digits, and with commas between thousands."""
    if value is None:
        return ""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("e-0", "e-")


def filled(page: str, table: str) -> str:
    """The page with the table between its two comments.

    Raises:
        ValueError: The page does not have both comments once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs these two lines, once and in this order: {BEGIN.strip()} {END.strip()}")
    before, rest = page.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main() -> None:
    """Prints the table or writes it into the README."""
    parser = argparse.ArgumentParser(description="Makes the table of targets beside measurements.")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    table = markdown(read(RESULTS))
    if not parser.parse_args().write:
        print(table, end="")
        return
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
