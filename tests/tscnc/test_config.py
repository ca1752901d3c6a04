"""The configuration: one declaration, three forms, clear errors."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from tscnc.config import ConfigError, TrainConfig, add_flags, flag_values

CHANGED = TrainConfig(
    dataset="fashion-mnist",
    data_dir="some where/else # not a comment",
    epsilon="8/255",  # type: ignore[arg-type]
    finetune_epochs=3,
    finetune_lr=1e-7,
    cnc=2e22,
    sparsity=0,
    score="lamp",
)


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED], ids=["defaults", "changed"])
def test_yaml_round_trip(config: TrainConfig) -> None:
    assert TrainConfig.from_yaml(config.to_yaml()) == config


def test_yaml_has_every_option_with_its_help() -> None:
    lines = TrainConfig().to_yaml().splitlines()
    for line, field in zip(lines, dataclasses.fields(TrainConfig), strict=True):
        assert line.startswith(f"{field.name}: ")
        assert line.endswith(f"# {field.metadata['help']}")


def test_flags_round_trip() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig())
    words = []
    for name, value in dataclasses.asdict(CHANGED).items():
        words += ["--" + name.replace("_", "-"), "none" if value is None else str(value)]
    assert TrainConfig().replace(**flag_values(parser.parse_args(words))) == CHANGED


def test_flags_that_are_not_given_change_nothing() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig())
    assert flag_values(parser.parse_args(["--epochs", "3"])) == {"epochs": 3}


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser, TrainConfig(epochs=77))
    parser.print_help()
    text = " ".join(capsys.readouterr().out.split())
    assert "epochs before pruning (default: 77)" in text
    assert "none = as many as before (default: none)" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsty: 0.5", ["'sparsty'", "did you mean sparsity"]),
        ("sparsity: 1", ["sparsity", "[0, 1)", "got 1"]),
        ("epochs: 1.5", ["epochs", "whole number", "1.5"]),
        ("epochs: true", ["epochs", "whole number", "True"]),
        ("lr: .nan", ["lr", "finite number", "nan"]),
        ("lr: fast", ["lr", "finite number", "'fast'"]),
        ("epsilon: 1/0", ["epsilon", "'1/0'"]),
        ("epsilon: 1/2/3", ["epsilon", "'1/2/3'"]),
        ("epsilon: 0", ["epsilon", "> 0", "got 0"]),
        ("score: magnitud", ["score", "one of magnitude, lamp", "did you mean magnitude"]),
        ("model: 3", ["model", "text", "got 3"]),
        ("- epochs", ["expected `option: value` lines", "list"]),
        ("epochs: [", ["not valid YAML"]),
    ],
)
def test_bad_yaml_says_what_is_wrong(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(text, source="my.yaml")
    for word in ["my.yaml", *words]:
        assert word in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", binary):
        with pytest.raises(ConfigError, match=path.name):
            TrainConfig.from_file(path)


def test_labels_name_what_a_run_does() -> None:
    assert TrainConfig(sparsity=0.99).label == "99 % pruned, TSC + CNC"
    assert TrainConfig(sparsity=0.995, tsc=0).label == "99.5 % pruned, CNC"
    assert TrainConfig(sparsity=0, tsc=0, cnc=0).label == "dense"
