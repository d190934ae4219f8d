"""What a step of our trainer costs beside its forwards, on many GPUs: formulas, and a table for 8B and 70B models.

    python -m bench.scale                   prints the table of bench/SCALE.md
    python -m bench.scale --measure DIR     checks the formulas with 1, 2 and 4 processes on this machine's CPU

Symbols, all for one generation batch:

    R   processes, one GPU each, ``NODE`` to a node       N   prompts               G   responses to each prompt
    B   responses, N G, dealt evenly: b = B / R, n = N / R to a process             K   rewards
    d   width of a hidden state                           U   optimiser steps from the batch
    p, c   bytes of a prompt's and of a completion's text (UTF-8)
    P   parameters of the policy                          L   tokens of a response with its prompt

``exchanges`` lists every call by which processes exchange anything in a generation batch, with the bytes that each
process gives. ``bench/scale_processes.py`` counts the calls of a real run and compares them, byte by byte. All calls
are all-gathers, so each process receives (R - 1) times what one gives; objects are pickled, come with 8 bytes of
length from each process, and are padded to the longest.

The time of a call is that of ``Link``: alpha(R) + (bytes received) / rate. For objects there is a call for the lengths
before it, and every process unpickles R objects, which takes ``unpickle`` seconds each and the time of their text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

NODE = 8  # GPUs of a node
PICKLE_HEADER = 2  # the protocol
FRAME = 9  # what begins a frame of 64 KiB
FRAME_SIZE = 64 * 1024


# --- what is exchanged -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Texts in the order of a process's responses: their bytes, and how many responses in a row share each.

    Texts that several responses share are one object, which is pickled once.
    """

    sizes: Sequence[int]
    shared_by: int = 1


@dataclass(frozen=True)
class Batch:
    """A generation batch as one process sees it.

    Attributes:
        prompts: n, of this process.
        group_size, rewards, width, updates: G, K, d and U.
        families, texts, completions: what ``StepRecord`` has of the responses.
        context: "none", "response" for a state of each response, or "reference" for the reference's of the prompts.
        anchor: whether there is a utility.
        figures: for each line of the log, U of them, the names of its figures and over how many values each is a mean.
        processes: R.
    """

    prompts: int
    group_size: int
    rewards: int
    width: int
    families: Texts
    texts: Texts
    completions: Texts
    updates: int = 1
    context: str = "response"
    anchor: bool = False
    figures: Sequence[dict[str, int]] = ()
    processes: int = 1

    @property
    def responses(self) -> int:
        """b, of this process."""
        return self.prompts * self.group_size


@dataclass(frozen=True)
class Exchange:
    """Calls of one kind in a generation batch.

    Attributes:
        stage: the function that makes them.
        objects: whether objects are pickled; otherwise a tensor is gathered.
        sizes: the bytes that this process gives in each call.
    """

    stage: str
    objects: bool
    sizes: tuple[int, ...]


def exchanges(batch: Batch) -> list[Exchange]:
    """Every exchange of a generation batch whose log has a line for each step.

    It holds for rewards that ask the policy for nothing, without refills, and with responses that are all in the loss.
    """
    b, U = batch.responses, batch.updates
    calls = []
    if batch.context == "reference":
        calls += [Exchange("PromptContexts", False, (8,))]
    if batch.context != "none":
        calls += [Exchange("_hidden_states", False, (4 * b * batch.width,))]
    calls += [Exchange("context_of", False, (4 * b * batch.rewards, *((4 * b,) if batch.anchor else ())))]
    records = tuple(pickled_texts(texts) for texts in (batch.families, batch.texts, batch.completions))
    calls += [
        Exchange("step_record", True, records),
        Exchange("step_record", False, (b,)),
        Exchange("all_lengths", False, (8 * b,)),
        Exchange("sampler_metrics", False, (40,)),
        Exchange("_micro_batches", False, (32 * U,)),
        Exchange("log", True, tuple(map(pickled_log, batch.figures))),
    ]
    if batch.processes > 1:
        calls += [Exchange("_anywhere", False, (4,) * (1 + U)), Exchange("agreed", False, (8,) * U)]
    return calls


def pickled_list(items: Sequence[int]) -> int:
    """The bytes of a pickled list (protocol 4), given those of each item; exact up to a frame of 64 KiB."""
    marks = 1 if len(items) == 1 else 2 * -(-len(items) // 1000)
    body = 2 + marks + sum(items) + 1
    return PICKLE_HEADER + FRAME * max(1, -(-body // FRAME_SIZE)) + body


def pickled_text(size: int) -> int:
    """The bytes of a text of ``size`` bytes: opcode, length, text, and its number in the memo."""
    return size + (3 if size < 256 else 6)


def pickled_texts(texts: Texts) -> int:
    """The bytes of a pickled list of texts. A text that comes again is named by its number, 0 being the list's own."""
    again = [2 if 1 + i < 256 else 5 for i in range(len(texts.sizes))]
    each = [pickled_text(size) for size in texts.sizes]
    return pickled_list([item for i, new in enumerate(each) for item in (new, *[again[i]] * (texts.shared_by - 1))])


def pickled_log(figures: dict[str, int]) -> int:
    """The bytes of [{name: (sum, count)}], see ``MetricMeans.state``."""
    counts = [2 if count < 256 else 3 if count < 65536 else 5 for count in figures.values()]
    each = sum(pickled_text(len(name.encode())) + 9 + 2 for name in figures) + sum(counts)
    return pickled_list([2 + (2 if len(figures) > 1 else 1) + each]) if figures else pickled_list([2])


# --- how long it takes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """What joins the processes.

    Attributes:
        call: seconds of a call without any hop.
        near, far: seconds for a hop within a node and between nodes; a ring makes R - 1 hops.
        rate: bytes a second that a process receives.
        unpickle: seconds for each pickle that a process unpickles and unpacks.
        figure: seconds to unpickle a figure of the log and to add it up.
        text_rate: bytes of text a second that a process unpickles.
    """

    call: float
    near: float
    far: float
    rate: float
    unpickle: float = 0.0
    figure: float = 0.0
    text_rate: float = float("inf")

    def alpha(self, processes: int) -> float:
        """Seconds of an all-gather of nothing."""
        nodes = -(-processes // NODE)
        return self.call + self.far * (nodes - 1) + self.near * (processes - nodes)

    def seconds(self, processes: int, size: int, *, objects: bool = False) -> float:
        """Seconds of an all-gather to which each process gives ``size`` bytes."""
        received = (processes - 1) * size
        found = self.alpha(processes) + received / self.rate
        if objects:
            found += self.alpha(processes) + 8 * (processes - 1) / self.rate
            found += processes * (self.unpickle + size / self.text_rate)
        return found


def seconds_by_stage(calls: Iterable[Exchange], processes: int, link: Link) -> dict[str, float]:
    """Seconds of each stage's exchanges."""
    found: dict[str, float] = {}
    for call in calls:
        spent = sum(link.seconds(processes, size, objects=call.objects) for size in call.sizes)
        found[call.stage] = found.get(call.stage, 0.0) + spent
    return found


# H100 and H200 in nodes of 8. Rates: NVIDIA's data sheets of the H100 (NVLink 4: 900 GB/s in both directions) and of
# ConnectX-7 (NDR InfiniBand, 400 Gb/s for each GPU); a ring over several nodes goes at the rate of the slower one.
# Hops: NCCL, src/graph/tuning.cc, ring with the protocol Simple: 3.4 us by NVLink, 14 us by the network, 8.4 us a call.
# Pickles: measured on one core with the functions of torch.distributed: 8 us each, 2 GB/s, 0.5 us a figure; and 20 us
# for two waits for the device, which is an assumption.
CLUSTER = Link(call=8.4e-6, near=3.4e-6, far=14e-6, rate=50e9, unpickle=28e-6, figure=0.5e-6, text_rate=2e9)
HBM = 3.35e12  # bytes a second, data sheet of the H100 SXM
MATMUL = 0.4 * 989e12  # FLOP/s that training reaches: 40 % of the dense bfloat16 rate in the data sheet
DISK = 2e9  # bytes a second of a shared file system, an assumption


@dataclass(frozen=True)
class Model:
    """A policy, with the number of its tensors."""

    name: str
    parameters: float
    width: int
    tensors: int


MODELS = (Model("8B", 8.03e9, 4096, 291), Model("70B", 70.6e9, 8192, 723))  # the shapes of Llama 3.1
SCALES = (64, 1024)
PROMPTS_EACH, GROUP, REWARDS, TOKENS = 2, 8, 6, 1280  # of a process: prompts; responses to each; of a run: K, L
PROMPT_BYTES, COMPLETION_BYTES = 1024, 4096
FIGURES = 90  # of a line of the log, with names of 28 bytes


def cluster_batch(model: Model, processes: int, context: str = "response") -> Batch:
    """The batch of the tables: two prompts with eight responses for each GPU."""
    b = PROMPTS_EACH * GROUP
    return Batch(
        PROMPTS_EACH,
        GROUP,
        REWARDS,
        model.width,
        Texts([8] * PROMPTS_EACH, GROUP),
        Texts([PROMPT_BYTES] * PROMPTS_EACH, GROUP),
        Texts([COMPLETION_BYTES] * b),
        context=context,
        anchor=context == "reference",
        figures=[{f"{i:028d}": 1 for i in range(FIGURES)}],
        processes=processes,
    )


GROUPS = {
    "hidden states": ("_hidden_states", "PromptContexts"),
    "rewards, utilities, lengths, flags": ("context_of", "all_lengths", "sampler_metrics", "_micro_batches"),
    "records (prompts, texts, families)": ("step_record",),
    "checks and signals": ("_anywhere", "agreed"),
    "figures of the log": ("log",),
}


def exchange_rows(model: Model, processes: int, context: str = "reference") -> list[tuple[str, float, float]]:
    """For each group of stages its name, the bytes that a process receives, and seconds."""
    calls = exchanges(cluster_batch(model, processes, context))
    rows = []
    for name, stages in GROUPS.items():
        own = [call for call in calls if call.stage in stages]
        received = sum((processes - 1) * (size + 8 * call.objects) for call in own for size in call.sizes)
        seconds = sum(seconds_by_stage(own, processes, CLUSTER).values())
        if stages == ("log",):
            seconds += processes * FIGURES * CLUSTER.figure
        rows.append((name, received, seconds))
    return rows


def other_rows(model: Model, processes: int) -> list[tuple[str, float, float]]:
    """The stages that are no exchange of ``Processes``: name, bytes through one GPU's link, seconds."""
    b, B, P = PROMPTS_EACH * GROUP, PROMPTS_EACH * GROUP * processes, model.parameters
    conductor = 3 * 4.0 * B * model.width / HBM + 20e-6  # h is read for the moments, for the weights and by the update
    anchored = 0.43 + 3.1e-4 * model.width  # measured on one core, replay full: 4,096 groups of different prompts
    gathered = 2 * P * (1 - 1 / processes)  # cast to the engine's bfloat16 before, one tensor at a time
    gather = gathered / CLUSTER.rate + model.tensors * CLUSTER.alpha(processes)
    sent = 2 * P  # bfloat16, from one GPU to the server's workers
    driver = 10e-3 * B * 1024 / (4096 * 1024)  # measured: bench_verl.py, 10 ms for B = 4,096 and 1,024 tokens
    to_driver = 4.0 * B * model.width
    forward = 2 * P * b * TOKENS / MATMUL
    shards = 2 * P * (1 - 1 / processes)
    return [
        ("Conductor: weights and update (GPU, replicated)", 0.0, conductor),
        ("anchored: update (CPU, replicated), at most", 0.0, anchored),
        ("weight sync: gather of bfloat16 shards", gathered, gather),
        ("weight sync: NCCL, one GPU to the server", sent, sent / CLUSTER.rate),
        ("weight sync: a folder, written and read", 2 * sent, 2 * sent / DISK),
        ("verl: hidden states to the driver, 1 GB/s", to_driver, to_driver / 1e9),
        ("verl: the driver's advantages (CPU)", 0.0, driver),
        ("training's own: forwards and backward", 0.0, 4 * forward),
        ("training's own: FSDP gathers and scatters", 4 * shards, 4 * shards / CLUSTER.rate),
    ]


def table() -> str:
    """The table of bench/SCALE.md."""
    columns = [(model, processes) for model in MODELS for processes in SCALES]
    width = 50
    lines = ["stage".ljust(width) + "".join(f"{m.name + ', ' + format(r, ','):>19}" for m, r in columns)]
    lines += [" " * width + f"{'GB':>11}{'ms':>8}" * len(columns)]
    found = [[*exchange_rows(m, r), *other_rows(m, r)] for m, r in columns]
    for cells in zip(*found, strict=True):
        line = cells[0][0].ljust(width)
        for _, size, seconds in cells:
            line += f"{f'{size / 1e9:.3g}' if size else '-':>11}{_milliseconds(seconds):>8}"
        lines.append(line)
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", type=Path, help="an empty folder; measures with 1, 2 and 4 processes")
    options = parser.parse_args()
    if options.measure is None:
        print(table())
        return
    from bench.scale_processes import measure

    measure(options.measure)


if __name__ == "__main__":
    main()
