"""The smallest configuration that goes through everything, for the tests of the training layer."""

from pathlib import Path

from tscnc.config import TrainConfig

TINY = TrainConfig(
    model="mlp-24",
    epochs=2,
    finetune_epochs=2,
    train_examples=96,
    eval_examples=40,
    batch_size=32,
    attack_steps=2,
    eval_steps=2,
    cnc_every=2,
    weight_decay=1e-4,
    sparsity=0.8,
    threads=1,
)


def flags(config: TrainConfig, **options: object) -> list[str]:
    """The command-line flags for the options in which `config` differs from the defaults."""
    default = TrainConfig()
    words = []
    for name, value in vars(config).items():
        if value != getattr(default, name):
            words += ["--" + name.replace("_", "-"), str(value)]
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def files_in(folder: Path) -> set[str]:
    """The names of everything below a folder, hidden files too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
