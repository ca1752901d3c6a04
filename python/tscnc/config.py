"""The configuration of a training run: one frozen dataclass, as YAML and as command-line flags.

Every option is declared once, in `TrainConfig`, with its default, its one-line help and what values
it accepts. The YAML file, the flags of `tscnc train` and all error messages are generated from that
declaration.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tscnc.optional import require


class ConfigError(ValueError):
    """A configuration value, key or file that cannot be used."""


class _Check(NamedTuple):
    """A predicate on a number, with the words an error message uses for it."""

    expected: str
    accepts: Callable[[Any], bool]


_POSITIVE = _Check("a number > 0", lambda value: value > 0)
_NOT_NEGATIVE = _Check("a number >= 0", lambda value: value >= 0)
_FRACTION = _Check("a number in [0, 1)", lambda value: 0 <= value < 1)
_SEED = _Check("a number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
_THREADS = _Check("a number from 0 to 1024", lambda value: 0 <= value <= 1024)


def _option(
    default: Any,
    help: str,
    *,
    group: str,
    check: _Check | None = None,
) -> Any:
    """Returns a dataclass field that knows its help line, its section and the values it accepts."""
    metadata = {"help": help, "group": group, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the numbers of one training run.

    Raises:
        ConfigError: a value of the wrong type or outside what its option accepts; the message
            quotes it.
    """

    dataset: Literal["digits", "mnist", "fashion-mnist"] = _option(
        "digits", "data set", group="data"
    )
    data_dir: str | None = _option(
        None, "folder with the data set's standard files (digits are built in)", group="data"
    )
    train_examples: int = _option(
        0, "train on the first N images only; 0 = all", group="data", check=_NOT_NEGATIVE
    )
    model: str = _option("mlp-1024-1024", "lenet-300-100 or mlp-WIDTH-WIDTH...", group="data")
    seed: int = _option(
        0, "seed of the weights, the data order and the attacks", group="data", check=_SEED
    )
    threads: int = _option(0, "CPU threads; 0 = torch's choice", group="data", check=_THREADS)

    task: Literal["trades", "pgd", "plain"] = _option(
        "trades",
        "adversarial training: TRADES, PGD, or plain cross-entropy",
        group="training",
    )
    epochs: int = _option(10, "epochs before pruning", group="training", check=_NOT_NEGATIVE)
    finetune_epochs: int | None = _option(
        None,
        "epochs after pruning; none = as many as before",
        group="training",
        check=_NOT_NEGATIVE,
    )
    batch_size: int = _option(128, "images per step", group="training", check=_POSITIVE)
    optimizer: Literal["sgd", "adam"] = _option(
        "adam", "SGD with Nesterov momentum, or Adam", group="training"
    )
    lr: float = _option(
        2e-3, "peak learning rate before pruning", group="training", check=_POSITIVE
    )
    finetune_lr: float | None = _option(
        1e-2, "peak learning rate after pruning; none = lr", group="training", check=_POSITIVE
    )
    momentum: float = _option(
        0.9, "momentum of SGD, first decay rate of Adam", group="training", check=_FRACTION
    )
    warmup: float = _option(
        0.1,
        "fraction of a phase in which the learning rate rises; it then falls as a cosine to 0",
        group="training",
        check=_FRACTION,
    )
    clip_norm: float = _option(
        1.0,
        "largest norm of the whole gradient; 0 = no limit",
        group="training",
        check=_NOT_NEGATIVE,
    )

    threat: Literal["Linf", "L2"] = _option("Linf", "norm that bounds the attack", group="attack")
    epsilon: float = _option(
        0.1,
        "radius of the attack for pixels in [0, 1]; 8/255 works",
        group="attack",
        check=_POSITIVE,
    )
    attack_steps: int = _option(
        7, "steps of the attack in training", group="attack", check=_POSITIVE
    )
    attack_step_size: float | None = _option(
        None, "step size of the attack; none = 2.5 epsilon / steps", group="attack", check=_POSITIVE
    )
    beta: float = _option(
        6.0, "weight of the robust term of TRADES", group="attack", check=_NOT_NEGATIVE
    )

    tsc: float = _option(
        1e-5, "weight of the transformed-l1 penalty (TSC)", group="penalties", check=_NOT_NEGATIVE
    )
    tsc_a: float = _option(
        1.0, "shape of transformed l1: small = l0, large = l1", group="penalties", check=_POSITIVE
    )
    cnc: float = _option(
        1e-4, "weight of the condition number penalty (CNC)", group="penalties", check=_NOT_NEGATIVE
    )
    cnc_form: Literal["scale_invariant", "logdet", "log_kappa", "nenov"] = _option(
        "scale_invariant",
        "form of the condition number penalty",
        group="penalties",
    )
    cnc_every: int = _option(
        4,
        "evaluate CNC every k-th step, weighted k-fold: bounds its cost, keeps its mean",
        group="penalties",
        check=_POSITIVE,
    )
    weight_decay: float = _option(
        0.0, "weight of half the sum of squared weights", group="penalties", check=_NOT_NEGATIVE
    )

    sparsity: float = _option(
        0.99, "fraction of the weights removed; 0 = no pruning", group="pruning", check=_FRACTION
    )
    score: Literal["magnitude", "lamp", "snip", "grasp", "synflow", "random"] = _option(
        "magnitude",
        "what decides which weights stay",
        group="pruning",
    )
    quota: Literal["igq", "erk", "uniform", "uniform_plus", "global"] = _option(
        "igq",
        "how the kept weights are spread over the layers",
        group="pruning",
    )

    eval_steps: int = _option(
        20, "steps of the attack in the final evaluation", group="evaluation", check=_POSITIVE
    )
    eval_examples: int = _option(
        0,
        "evaluate on the first N test images only; 0 = all",
        group="evaluation",
        check=_NOT_NEGATIVE,
    )
    epoch_examples: int = _option(
        1000,
        "test images attacked after each epoch; 0 = all",
        group="evaluation",
        check=_NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _parse(field.name, getattr(self, field.name)))

    @property
    def label(self) -> str:
        """What this run is, in the words of the report: `"99 % pruned, TSC + CNC"`."""
        pruned = f"{100 * self.sparsity:.4g} % pruned" if self.sparsity else "dense"
        penalties = " + ".join(
            name for name, weight in (("TSC", self.tsc), ("CNC", self.cnc)) if weight
        )
        return f"{pruned}, {penalties}" if penalties else pruned

    def replace(self, **changes: Any) -> TrainConfig:
        """Returns a copy with the given options changed and checked.

        Raises:
            ConfigError: an unknown option or a value it does not accept.
        """
        _refuse_unknown(changes, "option")
        return dataclasses.replace(self, **changes)

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Returns `"lr was 0.01 and is 0.002"` for every option that `saved` has otherwise.

        Where the data lies decides no number, so that `data_dir` may differ.
        """
        return [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in dataclasses.asdict(self).items()
            if saved.get(name) != value and name != "data_dir"
        ]

    def to_yaml(self) -> str:
        """Returns the configuration as YAML, every option on a line with its help."""
        lines = []
        for field in dataclasses.fields(self):
            entry = f"{field.name}: {_yaml_scalar(getattr(self, field.name))}"
            lines.append(f"{entry:<32}  # {field.metadata['help']}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "configuration") -> TrainConfig:
        """Reads a configuration from YAML; options that are not named keep their default.

        Args:
            text: a YAML mapping from option to value.
            source: name of the text in error messages.

        Raises:
            ConfigError: text that is no YAML mapping, an unknown key, or a value its option does
                not accept.
            ModuleNotFoundError: PyYAML is not installed.
        """
        yaml = require("yaml")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{source} is not valid YAML: {error}") from error
        content = {} if content is None else content
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"{source}: expected `option: value` lines, got a {type(content).__name__}"
            )
        try:
            return cls().replace(**{str(key): value for key, value in content.items()})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def from_file(cls, path: Path) -> TrainConfig:
        """Reads a configuration file; see `from_yaml`.

        Raises:
            ConfigError: the file cannot be read or holds no valid configuration.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        return cls.from_yaml(text, source=str(path))


_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_TYPES = typing.get_type_hints(TrainConfig)


def add_flags(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    """Adds one flag per option to `parser`; a flag that is not given leaves no trace."""
    groups: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        value = getattr(defaults, name)
        help_line = f"{field.metadata['help']} (default: {'none' if value is None else value})"
        arguments: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        arguments["help"] = help_line.replace("%", "%%")
        if _TYPES[name] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"] = _flag_type(name)
            arguments["metavar"] = "|".join(_choices(name)) or name.upper()
        groups[group].add_argument("--" + name.replace("_", "-"), **arguments)


def flag_values(namespace: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that were given as flags."""
    return {name: value for name, value in vars(namespace).items() if name in _FIELDS}


def close_matches(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean a or b?"` for the known words nearest to `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _flag_type(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return _parse(name, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from error

    return parse


def _refuse_unknown(names: Iterable[str], kind: str) -> None:
    for name in names:
        if name not in _FIELDS:
            raise ConfigError(f"unknown {kind} {name!r}{close_matches(name, _FIELDS)}")


def _parse(name: str, value: Any) -> Any:
    """Returns `value` in the type of option `name`, accepting the text forms of YAML and flags."""
    hint, choices, check = _TYPES[name], _choices(name), _FIELDS[name].metadata["check"]
    optional = isinstance(hint, types.UnionType)
    base = next(t for t in typing.get_args(hint) if t is not type(None)) if optional else hint
    base = str if choices else base
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    try:
        parsed = _CONVERTERS[base](value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        kind = _KINDS[base] + (" or none" if optional else "")
        raise ConfigError(f"{name}: expected {kind}, got {value!r}") from error
    if choices and parsed not in choices:
        hint_text = close_matches(str(parsed), choices)
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{hint_text}")
    if check is not None and not check.accepts(parsed):
        raise ConfigError(f"{name}: expected {check.expected}, got {value!r}")
    return parsed


def _choices(name: str) -> tuple[str, ...]:
    """Returns the words an option accepts, or nothing if it is no choice."""
    hint = _TYPES[name]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("not a truth value")
    return value


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError("not a whole number")
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("not a number")
    if isinstance(value, str) and "/" in value:
        numerator, denominator = value.split("/")
        number = float(numerator) / float(denominator)
    else:
        number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _to_str(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("not a text")
    return value


_CONVERTERS: dict[type, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
}
_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


def _yaml_scalar(value: Any) -> str:
    """Returns `value` as a YAML 1.1 scalar, where a float needs a dot before its exponent."""
    if isinstance(value, float):
        mantissa, exponent, power = repr(value).partition("e")
        return (mantissa if "." in mantissa else mantissa + ".0") + exponent + power
    return json.dumps(value)
