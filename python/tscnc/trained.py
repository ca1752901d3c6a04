"""Finished runs, read back from their folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor, nn

from tscnc import evaluate, models, spectrum
from tscnc.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from tscnc.compare import VARIANTS, is_comparison, title
from tscnc.config import TrainConfig
from tscnc.files import write_json
from tscnc.run_folder import RunFolder, RunFolderError
from tscnc.train import cpu_threads, load_dataset
from tscnc_kernels.nn import sparsify


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network with its masks and the configuration it was trained with."""

    model: nn.Module
    masks: dict[str, Tensor]
    config: TrainConfig


def load_trained(path: Path) -> Trained:
    """Loads a run's network, its pruned layers on sparse kernels.

    Args:
        path: a run folder, or a checkpoint file.

    Raises:
        RunFolderError: the folder holds no checkpoint.
        CheckpointError: the checkpoint is damaged or of an unknown model.
    """
    file = RunFolder(path).checkpoint if Path(path).is_dir() else Path(path)
    if not file.is_file():
        found = (
            f"{path} holds no {file.name}" if Path(path).is_dir() else f"there is no file {path}"
        )
        raise RunFolderError(f"{found}: expected the folder of a complete run, or a checkpoint")
    checkpoint = read_checkpoint(file)
    try:
        config = TrainConfig().replace(**checkpoint.metadata["config"])
        shape, classes = checkpoint.metadata["input_shape"], checkpoint.metadata["num_classes"]
        model: nn.Module = models.build(config.model, tuple(shape), classes)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not say which model it holds: {error!r}") from error
    if checkpoint.masks:
        sparsify(model, checkpoint.masks, mode="values")
    load_checkpoint(file, model)
    return Trained(model.eval(), checkpoint.masks, config)


def runs_in(path: Path) -> list[Path]:
    """Returns the run folders of a comparison, or `path` itself."""
    return [path / name for name in VARIANTS] if is_comparison(path) else [path]


def evaluate_again(run: Path) -> None:
    """Measures the checkpoint of a complete run once more and replaces the run's results.

    Raises:
        RunFolderError: there is no checkpoint, or it is of a run with another configuration.
        CheckpointError: the checkpoint is damaged or of an unknown model.
    """
    trained, folder = load_trained(run), RunFolder.reopen(run)
    config = folder.read_config()
    changed = config.differences(dataclasses.asdict(trained.config))
    if changed:
        raise RunFolderError(
            f"{folder.checkpoint} is of another run than {folder.config}: {', '.join(changed)}"
        )
    state = folder.read_state()
    with cpu_threads(config.threads):
        results = evaluate.evaluate_run(
            trained.model,
            trained.masks,
            load_dataset(config),
            config,
            spectra_before=state["spectra_before"] if state else {},
        )
    write_json(folder.results, results)


def spectrum_table(path: Path) -> str:
    """Returns a line on the singular values of every layer of a run, comparison or checkpoint."""
    parts = []
    for run in runs_in(path):
        trained = load_trained(run)
        heading = f"{title(run.name, trained.config.label)}\n" if is_comparison(path) else ""
        parts.append(heading + spectrum.table(trained.model, trained.masks))
    return "\n\n".join(parts)
