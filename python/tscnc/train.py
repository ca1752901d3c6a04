"""Training: pre-train a dense network, prune it once, fine-tune what is left on sparse kernels.

The same adversarial loss and the same penalties act before and after pruning. All randomness comes
from generators that are saved with the session at the end of every epoch, so that a resumed run
computes the same bits as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tscnc import data, evaluate, progress, pruning, report, spectrum
from tscnc.attacks import ThreatModel
from tscnc.checkpoint import save_checkpoint
from tscnc.config import TrainConfig
from tscnc.files import write_json
from tscnc.measure import checkpoint_metadata
from tscnc.optional import require
from tscnc.penalties import penalty_terms
from tscnc.run_folder import RunFolder
from tscnc.session import Phase, Session, phases
from tscnc.tasks import TASKS, step_size, training_attack

_SCORE_BATCHES = 10


class TrainingError(RuntimeError):
    """Training that cannot go on."""


def train(config: TrainConfig, run_dir: Path, *, resume: bool = False) -> Path:
    """Trains, prunes and fine-tunes a network, evaluates it and writes its report.

    Args:
        config: everything that decides the run's numbers.
        run_dir: the run's folder; empty or absent, or with `resume` that of an interrupted run of
            the same configuration.
        resume: continue after the last whole epoch instead of starting; a complete run is left
            as it is.

    Returns:
        `run_dir`.

    Raises:
        FileNotFoundError: the data set's files are not in `data_dir`.
        ModuleNotFoundError: safetensors is not installed.
        RunFolderError: the folder is in use, cannot be written, or cannot be resumed.
        TrainingError: the loss, a gradient or a weight became NaN or infinite; the folder keeps the
            last whole epoch.
    """
    require("safetensors.torch")
    if resume and RunFolder(run_dir).complete:
        progress.say(f"{run_dir} is complete already")
        return Path(run_dir)
    with cpu_threads(config.threads):
        session = Session(config, load_dataset(config))
        folder = RunFolder.reopen(run_dir) if resume else RunFolder.create(run_dir, config)
        saved = folder.load_state()
        if saved is None:
            folder.begin()
            folder.save_state(session.state())
        else:
            session.load_state(saved, source=folder.state)

        plan = phases(config)
        while session.phase < len(plan):
            phase = plan[session.phase]
            while session.epoch < phase.epochs:
                started = time.perf_counter()
                run_epoch = _prune if phase.name == "prune" else _train_epoch
                numbers = run_epoch(session, phase)
                _refuse_not_finite(dict(session.model.named_parameters()), _place(session, phase))
                session.epoch += 1
                record = {
                    "phase": phase.name,
                    "epoch": session.epoch,
                    **numbers,
                    **_accuracies(session),
                    "seconds": round(time.perf_counter() - started, 3),
                }
                folder.append_metrics(record)
                folder.save_state(session.state())
                progress.say(progress.epoch_line(record, phase.epochs))
            session.start_phase(session.phase + 1)

        _conclude(session, folder)
    return Path(run_dir)


def load_dataset(config: TrainConfig) -> data.Dataset:
    """Loads the data set of a configuration, cut to its `train_examples` and `eval_examples`."""
    dataset = data.load(config.dataset, config.data_dir)
    train, test = config.train_examples or None, config.eval_examples or None
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:train],
        train_labels=dataset.train_labels[:train],
        test_images=dataset.test_images[:test],
        test_labels=dataset.test_labels[:test],
    )


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Runs with `count` CPU threads; 0 leaves torch's choice."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learning_rate(peak: float, step: int, total: int, warmup: float) -> float:
    """Computes a step's learning rate: a linear warm-up to `peak`, then half a cosine down to 0."""
    rising = warmup * total
    if step + 1 < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * max(0.0, step - rising) / (total - rising)))


def _train_epoch(session: Session, phase: Phase) -> dict[str, float]:
    """Runs one epoch and returns the mean of the loss and of each of its parts over the images."""
    config, dataset, model = session.config, session.dataset, session.model
    attack = training_attack(config, session.generators["attack"])
    order = torch.randperm(len(dataset.train_labels), generator=session.generators["order"])
    batches = order.split(config.batch_size)
    sums: defaultdict[str, float] = defaultdict(float)

    model.train()
    bar = progress.track(batches, total=len(batches), description=_place(session, phase))
    for step, chosen in enumerate(bar, start=session.epoch * len(batches)):
        images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
        lr = learning_rate(phase.lr, step, phase.epochs * len(batches), config.warmup)
        for group in session.optimizer.param_groups:
            group["lr"] = lr

        parts = TASKS[config.task](model, images, labels, config, attack)
        output = parts.pop("output")
        penalties = penalty_terms(model, config, step)
        loss = parts["loss"] + sum(penalties.values())
        _refuse_not_finite({"loss": loss}, _place(session, phase))

        session.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
        _refuse_not_finite({"gradient": norm}, _place(session, phase))
        session.optimizer.step()

        correct = (output.argmax(1) == labels).float().mean()
        for name, value in {**parts, **penalties, "loss": loss, "train_accuracy": correct}.items():
            sums[name] += value.item() * len(chosen)
    means = {name: total / len(order) for name, total in sorted(sums.items())}
    return {"loss": means.pop("loss"), **means}


def _prune(session: Session, phase: Phase) -> dict[str, float]:
    """Prunes the model in one shot and returns what that left."""
    config, model = session.config, session.model
    images, labels = session.dataset.train_images, session.dataset.train_labels
    generator = session.generators["pruning"]
    chosen = torch.randperm(len(labels), generator=generator)[: _SCORE_BATCHES * config.batch_size]
    batches = [(images[part], labels[part]) for part in chosen.split(config.batch_size)]

    session.spectra_before = spectrum.singular_values(model)
    score = getattr(pruning.scores, config.score)
    scores = score(model, batches=batches, example_input=images[:1], generator=generator)
    masks = pruning.masks_from_scores(scores, config.sparsity, quota=config.quota)
    sizes = pruning.sparsity_report(model, masks, images[:1])
    session.prune(masks)
    kept = sum(int(mask.sum()) for mask in masks.values())
    return {"kept": kept, "sparsity": sizes["direct"], "effective_sparsity": sizes["effective"]}


def _accuracies(session: Session) -> dict[str, float]:
    """Measures the accuracy on the test images, and on `epoch_examples` of them under attack."""
    config, model, dataset = session.config, session.model, session.dataset
    images, labels = dataset.test_images, dataset.test_labels
    attacked, steps = config.epoch_examples or None, config.attack_steps
    model.eval()
    return {
        "clean_accuracy": evaluate.accuracy(model, images, labels),
        "pgd_accuracy": evaluate.pgd_accuracy(
            model,
            images[:attacked],
            labels[:attacked],
            ThreatModel(config.threat, config.epsilon),
            steps=steps,
            step_size=step_size(config, steps),
        ),
    }


def _conclude(session: Session, folder: RunFolder) -> None:
    """Writes the checkpoint, the results and the report, which comes last in a complete run."""
    config, dataset, model = session.config, session.dataset, session.model
    metadata = checkpoint_metadata(dataset, config)
    save_checkpoint(folder.checkpoint, model, session.masks, metadata)
    progress.say("evaluating")
    results = evaluate.evaluate_run(
        model, session.masks, dataset, config, spectra_before=session.spectra_before
    )
    write_json(folder.results, results)
    report.write_report(folder.path)


def _refuse_not_finite(values: Mapping[str, Tensor], place: str) -> None:
    for name, value in values.items():
        if not value.isfinite().all():
            raise TrainingError(
                f"{name} became NaN or infinite in {place}; the run folder keeps the epoch before. "
                "A lower --lr, or a lower weight of the penalties, may help"
            )


def _place(session: Session, phase: Phase) -> str:
    return f"{phase.name} {session.epoch + 1}/{phase.epochs}"
