"""The command line: ``maestro-fast`` or ``python -m maestro_fast``.

Each command imports only what it needs, and looks at the paths that it was given before it imports torch, which takes
seconds. So a wrong path is answered at once.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maestro_fast import __version__
from maestro_fast.config_file import absolute_paths, check_paths, read_config, settings_of_words
from maestro_fast.error_report import explain

_VERBOSE = ("-v", "--verbose")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0; 2 for bad input, whose message names the setting, or a run that is not finite any more; or
        128 plus the number of the signal that stopped the command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = any(word in _VERBOSE for word in words)  # It may stand anywhere, also behind the settings of a run.
    parser = _parser()
    arguments, rest = parser.parse_known_args([word for word in words if word not in _VERBOSE])
    if rest and arguments.command not in ("train", "check", "eval"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("maestro_fast").setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        return _run(arguments, rest)
    except Exception as error:
        message = None if verbose else explain(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("\n".join([f"maestro-fast: {stopped or 'stopped'}", *getattr(stopped, "__notes__", [])]), file=sys.stderr)
        return 128 + getattr(stopped, "signal", signal.SIGINT)


def _run(arguments: argparse.Namespace, settings: list[str]) -> int:
    if arguments.command == "quickstart":
        return _quickstart(arguments.out, arguments.resume)
    if arguments.command == "train":
        return _train(arguments.config, arguments.resume, settings)
    if arguments.command == "init":
        return _init(arguments)
    if arguments.command == "check":
        _check_counts(arguments)
        return _check(arguments.config, settings, arguments.prompts, arguments.tokens)
    if arguments.command == "report":
        return _report(arguments.run_dir, arguments.compare, arguments.title)
    if arguments.command == "eval":
        return _eval(arguments.suite, settings)
    if arguments.command == "compare":
        return _compare(arguments.runs, arguments.out)
    if arguments.command == "conductor":
        return _show_conductor(arguments)
    return _info()


class _TrainHelp(argparse.Action):
    """Prints the help of ``train``, and then every setting of a config, for which it imports what a run imports."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(parser.format_help(), flush=True)
        from maestro_fast.config_reference import as_text  # This takes seconds, so the rest is shown before.

        print(as_text())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maestro-fast", description="GRPO with adaptive weights for several rewards.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="log choices and their reasons; show whole tracebacks; it may stand anywhere",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("quickstart", help="train a tiny model on bundled prompts, in a few minutes on a CPU")
    start.add_argument(
        "--out", type=Path, help="the directory for the results (default: the first free runs/quickstart*)"
    )
    start.add_argument("--resume", action="store_true", help="go on with a quickstart in --out that was killed")
    _add_starting(commands)
    train = commands.add_parser("train", help="a training run from a YAML file", allow_abbrev=False, add_help=False)
    train.add_argument("config", type=Path, help="the YAML file")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run_dir")
    train.add_argument("-h", "--help", action=_TrainHelp, help="show this message, and all settings of the YAML file")
    train.epilog = (
        "Any setting can be changed behind the file: --sampling.group_size 16 --weights equal. "
        "Relative paths in the file start in its folder, and those on the command line in the working directory."
    )
    report = commands.add_parser("report", help="the HTML page and the plots of a run, which may still be training")
    report.add_argument("run_dir", type=Path, help="the run directory")
    report.add_argument("--title", help="the title of the page (default: the directory's name)")
    report.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="LABEL=RUN_DIR",
        help="lay the weights of another run over those of this one, up to three times",
    )
    _add_evals(commands)
    _add_conductor(commands)
    commands.add_parser("info", help="versions, devices, and which backend and attention serve, with the reasons")
    return parser


def _add_starting(commands: Any) -> None:
    init = commands.add_parser("init", help="write a commented config for a model and data", allow_abbrev=False)
    init.add_argument("--model", required=True, help="a checkpoint, or a name of the hub")
    init.add_argument("--data", required=True, metavar="FILE", help="the prompts, as data.path takes them")
    init.add_argument(
        "--rewards",
        metavar="LIST",
        help="types of rewards and functions of your own, with commas between them: format,length,my_rewards.py:score",
    )
    init.add_argument("--weights", help="the type of the weight policy (default: conductor for several rewards)")
    init.add_argument("--prompt-column", help="the column of the prompts, where it has an unusual name")
    init.add_argument("--out", type=Path, default=Path("config.yaml"), help="the file to write (%(default)s)")
    check = commands.add_parser("check", help="check a run and try a step of it, without training", allow_abbrev=False)
    check.add_argument("config", type=Path, help="the YAML file")
    check.epilog = "Any setting can be changed behind the file, as in train: --sampling.group_size 16 --weights equal."
    for command in (init, check):
        command.add_argument("--prompts", type=int, default=4, help="the number of prompts that are answered (4)")
        command.add_argument(
            "--tokens", type=int, default=64, help="the most tokens of a response, where the policy samples itself (64)"
        )


def _add_evals(commands: Any) -> None:
    suite = commands.add_parser(
        "eval", help="train many arms on many seeds: do adaptive weights pay, with how many labels?", allow_abbrev=False
    )
    suite.add_argument("suite", help="conflict, conflict_lm, or the YAML file of a suite of your own")
    suite.epilog = (
        "Any setting can be changed behind it: --seeds 3 --out runs/mine --run.model.path M. A suite that was stopped "
        "goes on where it was; finished trainings are not repeated. maestro_fast/evals/README.md lists the settings."
    )
    compare = commands.add_parser("compare", help="tables, intervals and plots of suites or runs side by side")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a suite or a run, or LABEL=DIR,DIR")
    compare.add_argument("--out", type=Path, help="a directory for tables, figures and a page in HTML")


def _add_conductor(commands: Any) -> None:
    conductor = commands.add_parser("conductor", help="look into a saved Conductor", allow_abbrev=False)
    actions = conductor.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="the weights that it gives to each prompt of a data set", allow_abbrev=False)
    show.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="a folder of save_pretrained, a run directory, or its final/ or a checkpoint",
    )
    show.add_argument(
        "--on", required=True, metavar="PROMPTS", help="a .jsonl or .parquet file, or the name of a data set"
    )
    show.add_argument("--model", help="the model whose states it reads (default: the one that DIR or its run names)")
    show.add_argument("--out", type=Path, default=Path("prompt_weights.png"), help="the picture (%(default)s)")
    show.add_argument(
        "--rows",
        type=int,
        default=20,
        help="the number of prompts in the table (%(default)s); everything else uses all prompts",
    )
    show.add_argument("--limit", type=int, help="use only the first LIMIT prompts")
    show.add_argument(
        "--samples",
        type=int,
        default=4,
        help="the number of responses to a prompt, if the Conductor reads responses (%(default)s)",
    )
    show.add_argument("--seed", type=int, default=0, help="the seed of these responses (%(default)s)")
    show.add_argument("--prompt-column", help="the column of the prompts (default: prompt, else messages)")
    show.add_argument("--family-column", help="the column of the task families (default: family, if there is one)")


def _quickstart(out: Path | None, resume: bool) -> int:
    from maestro_fast.quickstart.run import quickstart

    if resume and (out is None or not out.is_dir()):
        raise ValueError(f"--resume: needs --out, the directory of an earlier quickstart, got {out}")
    if out is None:
        names = (Path("runs") / f"quickstart{suffix}" for suffix in ["", *(f"-{n}" for n in range(2, 10_000))])
        out = next(path for path in names if not path.exists())
    quickstart(out, resume=resume)
    return 0


def _train(config: Path, resume: bool, overrides: list[str]) -> int:
    raw = read_config(config, overrides)
    check_paths(raw)  # A wrong path is found here, before the imports that take seconds.
    from maestro_fast.reporting import printed_verdict
    from maestro_fast.reporting.recorded_run import ended_by_alarm, recorded_train, try_report

    trainer, run_dir = recorded_train(raw, resume=resume), Path(raw["run_dir"])
    if trainer.is_world_process_zero():
        alarm = ended_by_alarm(run_dir, trainer.state.global_step)
        print("\n".join([*alarm, printed_verdict(run_dir), try_report(run_dir)]))
    return 0


def _init(arguments: argparse.Namespace) -> int:
    _check_counts(arguments)
    if arguments.out.exists():
        raise ValueError(f"--out: {arguments.out} is there already, and init overwrites nothing")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no directory {arguments.out.absolute().parent}")
    check_paths(absolute_paths({"model": {"path": arguments.model}, "data": {"path": arguments.data}}, Path.cwd()))
    from maestro_fast.starting.init import InitOptions, write_config

    _quiet_loading()
    names = ("model", "data", "out", "rewards", "weights", "prompt_column")
    write_config(InitOptions(**{name: getattr(arguments, name) for name in names}))
    print(f"Wrote {arguments.out}. Checking it:\n")
    return _check(arguments.out, [], arguments.prompts, arguments.tokens)


def _check_counts(arguments: argparse.Namespace) -> None:
    for name in ("prompts", "tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: {getattr(arguments, name)}, expected at least 1")


def _quiet_loading() -> None:
    """Hides the bars of transformers where nobody watches them."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def _check(config: Path, overrides: list[str], prompts: int, tokens: int) -> int:
    raw = read_config(config, overrides)
    check_paths(raw)  # A wrong path is found here, before the imports that take seconds.
    from maestro_fast.starting.check import CheckOptions, check

    _quiet_loading()
    width = shutil.get_terminal_size((100, 24)).columns
    return 0 if check(raw, CheckOptions(prompts, tokens, width)) else 2


def _report(run_dir: Path, compare: list[str], title: str | None) -> int:
    others: dict[str, Path] = {}
    for entry in compare:
        label, equals, path = entry.partition("=")
        if not label or not equals or not path:
            raise ValueError(f"--compare: {entry!r}, expected LABEL=RUN_DIR")
        others[label] = Path(path)
    for name, folder in {"run_dir": run_dir, **{f"--compare {label}": path for label, path in others.items()}}.items():
        if not folder.is_dir():
            raise ValueError(f"{name}: there is no directory {folder}, expected that of a run")
    from maestro_fast.reporting import printed_verdict, write_report

    print(printed_verdict(run_dir, compare=others))
    print(f"Report: {write_report(run_dir, title=title, compare=others)}")
    return 0


def _eval(suite: str, words: list[str]) -> int:
    settings = settings_of_words(words)
    from maestro_fast.evals.run import BUNDLED, CONFLICT, evaluate

    if suite not in (*BUNDLED, CONFLICT) and not Path(suite).is_file():
        known = ", ".join([CONFLICT, *BUNDLED])
        raise ValueError(f"eval: there is no file {suite}, expected {known} or the YAML file of a suite")
    _quiet_loading()
    print(evaluate(suite, settings))
    return 0


def _compare(runs: list[str], out: Path | None) -> int:
    from maestro_fast.evals.compare import compare

    print(compare(runs, out))
    return 0


def _show_conductor(arguments: argparse.Namespace) -> int:
    for name, least in (("rows", 1), ("samples", 1), ("limit", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: {value}, expected at least {least}")
    if not arguments.folder.is_dir():
        raise ValueError(f"DIR: there is no folder {arguments.folder}, expected a saved Conductor or a run directory")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no directory {arguments.out.absolute().parent}")
    from transformers.utils.logging import disable_progress_bar

    from maestro_fast.reporting.prompt_weights import show_conductor
    from maestro_fast.training import DataConfig

    disable_progress_bar()  # This hides the bars of loading; the slow parts show bars of their own.
    data = DataConfig(
        arguments.on,
        prompt_column=arguments.prompt_column,
        family_column=arguments.family_column,
        limit=arguments.limit,
    )
    options = {name: getattr(arguments, name) for name in ("model", "out", "rows", "samples", "seed")}
    print(show_conductor(arguments.folder, data, **options))
    return 0


def _info() -> int:
    from maestro_fast.info import info_tables
    from maestro_fast.reporting import format_table

    print("\n\n".join(format_table(table) for table in info_tables()))
    return 0
