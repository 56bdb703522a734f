"""A whole training on one rank: data, model, steps, checkpoints, export."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from shardwise.materialization import Agreement
from shardwise.strategies.mesh import ranks_of
from shardwise.training.build import add_optimizer, make_model, refuse_unknown_tokens, tokenizer_of
from shardwise.training.evaluation import evaluate
from shardwise.training.metrics import Metrics
from shardwise.training.order import DataOrder
from shardwise.training.preemption import Preemption
from shardwise.training.resuming import find_start
from shardwise.training.saving import Saver
from shardwise.training.settings import TrainSettings
from shardwise.training.steps import StepFigures, Stepper
from shardwise.training.tokens import TokenRows, tokenise
from shardwise.transformers_model import TransformersModel
from shardwise.transformers_model.sealed import read_run

SCHEMA: Final = "shardwise.train/1"
CHECKPOINTS: Final = "checkpoints"
EXPORT: Final = "export"
_DATA: Final = "data"

Report = Callable[[Mapping[str, Any]], None]


def train(
    settings: TrainSettings, *, report: Report, at_end: Callable[[TransformersModel], Any] | None = None
) -> dict[str, Any]:
    """Train, on every rank of the default group, which is made where there is none. All ranks call this together.

    SIGTERM makes all ranks save at the end of the step and return; see `Preemption`.

    Args:
        settings: The same on all ranks.
        report: Told what happens, as JSON has it: `{"kind": "note", "text"}`, `{"kind": "step", ...}` with the figures of a step
            and `of` (steps in all), `{"kind": "eval", "step", "loss"}`. All ranks tell it the same; mostly one listens.
        at_end: Called with the trained model, after the export and not where the training was stopped; what it returns is in the
            outcome, as `at_end`.

    Returns:
        The outcome as JSON has it: `steps`, `step` (taken), `stopped` (by SIGTERM, and saved), `first_loss`, `loss`, `eval_loss`,
        `rows` (where the tokenised data is), `checkpoint`, `resumed_from`, `export`, `storage_bytes` (read of the model's own
        checkpoint), `ranks`, `seconds`.

    Raises:
        ConfigurationError: Settings that do not go together, or not with the checkpoint.
        DataError: The data cannot be used.
        CheckpointError: The model or a checkpoint cannot be read.
        RankError: Another rank failed, or did not arrive.
    """
    preemption = Preemption()
    with preemption.noted():
        run = _Run(settings, report, preemption)
        outcome = run.outcome()
        if at_end is not None and not outcome["stopped"]:
            outcome["at_end"] = at_end(run.model)
        return outcome


class _Run:
    def __init__(self, settings: TrainSettings, report: Report, preemption: Preemption) -> None:
        self._started = time.perf_counter()
        self._settings, self._report, self._preemption = settings, report, preemption
        self._directory = Path(settings.output_directory).absolute()
        self._note("preparing the model")
        self.model = make_model(settings)
        self._ranks = dist.get_world_size()
        rows_of_rank = settings.rows_of_rank(self._ranks)
        self._rows_of_pass = rows_of_rank // settings.gradient_accumulation
        self._data = self._tokenised()
        rows = self._data.summary.rows
        held_out = math.ceil(rows * settings.eval_fraction)
        self._eval_rows = range(rows - held_out, rows)
        self._order = DataOrder(rows=rows - held_out, batch_size=settings.batch_size, seed=settings.seed)
        self._steps = settings.steps or settings.epochs * self._order.steps_of_epoch
        add_optimizer(self.model, settings, steps=self._steps)
        self._identity = {
            **settings.identity(),
            "steps": self._steps,
            "data_digest": self._data.summary.digest,
        }
        self._saver = Saver(
            self.model,
            self._directory / CHECKPOINTS,
            run={"identity": self._identity, "ranks": self._ranks},
            keep=settings.keep,
            agree=self._agree,
        )
        self._losses: list[float] = []
        self._eval_loss: float | None = None

    def outcome(self) -> dict[str, Any]:
        """Train, and say what came of it."""
        resumed_from = self._resumed()
        start = 0 if resumed_from is None else int(read_run(resumed_from)["step"])
        metrics = Metrics(self._directory, steps=start) if dist.get_rank() == 0 else None
        try:
            step, stopped = self._train_from(start, metrics)
        finally:
            if metrics is not None:
                metrics.close()
        checkpoint = exported = None
        if stopped or self._settings.checkpoint_every is not None:
            checkpoint = self._saver.save(step) if step != start or resumed_from is None else resumed_from
        if self._settings.export and not stopped:
            exported = self._exported()
        load = self.model.last_report
        return {
            "schema": SCHEMA,
            "ranks": self._ranks,
            "steps": self._steps,
            "step": step,
            "stopped": stopped,
            "first_loss": self._losses[0] if self._losses else None,
            "loss": self._losses[-1] if self._losses else None,
            "eval_loss": self._eval_loss,
            "rows": str(self._rows_directory),
            "resumed_from": None if resumed_from is None else str(resumed_from),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "export": None if exported is None else str(exported),
            "storage_bytes": None if load is None else load.storage_bytes,
            "seconds": round(time.perf_counter() - self._started, 3),
        }

    def _train_from(self, start: int, metrics: Metrics | None) -> tuple[int, bool]:
        """Take the steps that are left; return how many are taken, and whether it was told to stop before the last one."""
        settings = self._settings
        stepper = Stepper(
            self.model,
            self._data,
            passes=settings.gradient_accumulation,
            max_grad_norm=settings.max_grad_norm,
        )
        rows = self._order.from_step(start)
        for step in range(start + 1, self._steps + 1):
            figures = stepper.take(
                step,
                next(rows),
                wants_stop=lambda: self._preemption.is_wanted,
                has_saved=lambda: self._saver.is_done,
            )
            self._keep(figures, metrics)
            if figures.is_save_done:
                self._saver.finish()
            if figures.is_stop_wanted:
                return step, True
            if step == self._steps:
                break
            if self._eval_rows and _is_due(step, settings.eval_every):
                self._evaluate(step, metrics)
            if _is_due(step, settings.checkpoint_every):
                self._note(f"writing the checkpoint of step {step}")
                (self._saver.begin if settings.async_checkpoints else self._saver.save)(step)
        if self._eval_rows:
            self._evaluate(self._steps, metrics)
        return self._steps, False

    def _keep(self, figures: StepFigures, metrics: Metrics | None) -> None:
        self._losses.append(figures.loss)
        if metrics is not None:
            metrics.add(figures.to_json())
        self._report({"kind": "step", "of": self._steps, **figures.to_json()})

    def _evaluate(self, step: int, metrics: Metrics | None) -> None:
        loss = evaluate(self.model, self._data, self._eval_rows, rows_of_pass=self._rows_of_pass)
        self._eval_loss = loss
        if metrics is not None:
            metrics.add({"step": step, "eval_loss": loss})
        self._report({"kind": "eval", "step": step, "loss": loss})

    def _tokenised(self) -> TokenRows:
        settings = self._settings
        tokenizer = tokenizer_of(self.model, settings.model)
        agreement = self._agree("data")
        self._note(f"tokenising {settings.data}")
        with agreement.phase("tokenise"):
            made = None
            if agreement.rank == agreement.ranks[0]:
                made = str(
                    tokenise(
                        Path(settings.data),
                        self._directory / _DATA,
                        tokenizer,
                        block_size=settings.block_size,
                        loss_on=settings.loss_on,
                        step=agreement.step,
                    )
                )
            directory = Path(
                json.loads(agreement.publish("rows", None if made is None else json.dumps(made)))
            )
        self._rows_directory = directory
        with agreement.phase("map"):
            data = TokenRows(directory)
            refuse_unknown_tokens(self.model, largest=data.summary.largest)
        summary = data.summary
        self._note(
            f"{summary.documents} documents, {summary.rows} rows of {summary.block_size} tokens, {summary.left_over} tokens left "
            f"over; loss on {summary.loss_on} tokens"
        )
        return data

    def _resumed(self) -> Path | None:
        """Go on from a checkpoint, if there is one to go on from, and return it."""
        directory = find_start(
            self._directory / CHECKPOINTS,
            self._settings.resume,
            identity=self._identity,
            agree=self._agree,
            note=self._note,
        )
        if directory is not None:
            self.model.load(directory)
            run = read_run(directory)
            self._note(
                f"going on from step {run['step']} of {self._steps}, which {run['ranks']} ranks wrote: {directory}"
            )
        return directory

    def _exported(self) -> Path:
        directory = self._directory / EXPORT
        self._note(f"writing {directory}")
        self.model.export(directory, dtype=self._settings.export_dtype, overwrite=True)
        return directory

    def _agree(self, call: str) -> Agreement:
        strategy = self.model.strategy
        return Agreement(
            ranks_of(strategy.device_mesh), timeout_seconds=strategy.timeout_seconds, call=f"train, {call}"
        )

    def _note(self, text: str) -> None:
        self._report({"kind": "note", "text": text})


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
