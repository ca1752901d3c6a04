"""The command `tscnc`: train, demo, evaluate, report, spectrum.

Exit codes: 0 done, 1 an error told in one line, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tscnc import config as configuration
from tscnc import progress
from tscnc.config import ConfigError, TrainConfig

# Three runs and their reports in about two minutes (2026-11, one core of an AMD Zen 3 server). One
# thread, so that the numbers do not depend on how many cores there are or how busy they are.
DEMO = TrainConfig(epochs=12, finetune_epochs=24, cnc_every=8, threads=1)

_RUNS = Path("runs")
_DRY_RUN_STEPS = 2
_DRY_RUN_IMAGES = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        progress.say("tscnc: interrupted")
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        progress.say(f"tscnc: error: {_one_line(error)}")
        return 1
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(commands[arguments.command], unknown[0])
    return arguments


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="tscnc",
        description="Train, measure and report highly pruned, well-conditioned, robust networks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tscnc {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, usage: str, help: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name,
            usage=f"tscnc {name} {usage}",
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        commands[name] = command
        return command

    command = add("train", "[FLAG ...]", "pre-train, prune, fine-tune and report on a network")
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file; flags override it")
    command.add_argument("--resume", type=Path, metavar="RUN", help="continue an interrupted run")
    command.add_argument(
        "--compare",
        action="store_true",
        help="train dense, pruned, and pruned with TSC + CNC, from the same seed",
    )
    _add_run_flags(command, TrainConfig())
    command.set_defaults(run=_train)

    command = add("demo", "[FLAG ...]", "train --compare, on the built-in digits")
    _add_run_flags(command, DEMO)
    command.set_defaults(run=_demo)

    command = add("evaluate", "RUN", "measure a run's checkpoint again")
    command.add_argument("path", type=Path, metavar="RUN")
    command.set_defaults(run=_evaluate)

    command = add("report", "RUN", "write a run's report.html again and print its table")
    command.add_argument("path", type=Path, metavar="RUN")
    command.set_defaults(run=_report)

    command = add("spectrum", "RUN_OR_CHECKPOINT", "print every layer's extreme singular values")
    command.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    command.set_defaults(run=_spectrum)
    return parser, commands


def _add_run_flags(command: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder (default: a new one in runs/)"
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="go through everything with two steps per phase, and keep nothing",
    )
    configuration.add_flags(command, defaults)


def _train(arguments: argparse.Namespace) -> None:
    changes = configuration.flag_values(arguments)
    if arguments.resume is not None:
        names = ("config", "out", "dry_run", "compare")
        given = [*changes, *[name for name in names if vars(arguments)[name]]]
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise ConfigError(f"--resume continues a run as it was configured; leave {flag} out")
        _run(None, arguments.resume, compare=None)
        return
    base = TrainConfig.from_file(arguments.config) if arguments.config else TrainConfig()
    config = base.replace(**changes)
    name = f"{config.dataset}-{config.model}" + ("-comparison" if arguments.compare else "")
    _start(config, arguments, name, compare=arguments.compare)


def _demo(arguments: argparse.Namespace) -> None:
    config = DEMO.replace(**configuration.flag_values(arguments))
    _start(config, arguments, "demo", compare=True)


def _start(config: TrainConfig, arguments: argparse.Namespace, name: str, *, compare: bool) -> None:
    from tscnc.run_folder import unused

    if config.data_dir is not None:  # absolute, so that the run can be resumed from anywhere
        config = config.replace(data_dir=str(Path(config.data_dir).resolve()))
    if arguments.dry_run:
        shorter = config.replace(
            epochs=1,
            finetune_epochs=1,
            train_examples=_DRY_RUN_STEPS * config.batch_size,
            eval_examples=_DRY_RUN_IMAGES,
        )
        print(config.to_yaml(), end="")
        with tempfile.TemporaryDirectory() as folder:
            _run(shorter, Path(folder) / "run", compare=compare, keep=False)
        progress.say("dry run complete; nothing was kept")
        return
    _run(config, arguments.out or unused(_RUNS / name), compare=compare)


def _run(config: TrainConfig | None, out: Path, *, compare: bool | None, keep: bool = True) -> None:
    """Starts a run, or continues the one in `out` if there is no configuration."""
    from tscnc.compare import compare as run_comparison
    from tscnc.compare import is_comparison
    from tscnc.run_folder import RunFolder
    from tscnc.train import train
    from tscnc_kernels import keep_freed_memory

    keep_freed_memory()
    resume = config is None
    if config is None:
        config, compare = RunFolder.reopen(out).read_config(), is_comparison(out)
    try:
        if compare:
            run_comparison(config, out, resume=resume)
        else:
            train(config, out, resume=resume)
    except KeyboardInterrupt:
        if keep and RunFolder(out).config.is_file():
            progress.say(f"continue with: tscnc train --resume {shlex.quote(str(out))}")
        raise
    _print_results(out)
    if keep:
        progress.say(f"report: {RunFolder(out).report}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from tscnc.run_folder import RunFolder
    from tscnc.trained import evaluate_again, runs_in

    for run in runs_in(arguments.path):
        RunFolder.reopen(run)
        progress.say(f"evaluating {run}")
        evaluate_again(run)
    _report(arguments)


def _report(arguments: argparse.Namespace) -> None:
    from tscnc.compare import collect_results, is_comparison
    from tscnc.report import write_report

    if is_comparison(arguments.path):
        collect_results(arguments.path)
    _print_results(arguments.path)
    progress.say(f"report: {write_report(arguments.path)}")


def _spectrum(arguments: argparse.Namespace) -> None:
    from tscnc.trained import spectrum_table

    print(spectrum_table(arguments.path))


def _print_results(run: Path) -> None:
    from tscnc.run_folder import RunFolder
    from tscnc.table import results_table

    results = RunFolder(run).read_results()
    print(results_table(results.get("runs", {"run": results})))


def _refuse(command: argparse.ArgumentParser, unknown: str) -> NoReturn:
    """Ends the program with exit code 2 and the flags nearest to an unknown one."""
    if not unknown.startswith("-"):
        command.error(f"unexpected argument {unknown!r}")
    flag = unknown.partition("=")[0]
    known = [option for action in command._actions for option in action.option_strings]
    if flag in known:
        command.error(f"{flag} goes after the command")
    command.error(f"unknown flag {flag!r}{configuration.close_matches(flag, known)}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return text if expected and text else f"{type(error).__name__}: {text}"


def _version() -> str:
    try:
        return importlib.metadata.version("tscnc-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "of an uninstalled checkout"
