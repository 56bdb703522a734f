"""A whole training on one rank: data, model, steps, checkpoints, export."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from shardwise.errors import DivergedError, PeerError, RankError
from shardwise.materialization import Agreement
from shardwise.strategies.mesh import ranks_of
from shardwise.training.build import add_optimizer, make_model, refuse_unknown_tokens, tokenizer_of
from shardwise.training.checkpoints import CHECKPOINTS, DIGEST_NAME
from shardwise.training.evaluation import evaluate
from shardwise.training.metrics import Metrics
from shardwise.training.order import DataOrder
from shardwise.training.preemption import Preemption
from shardwise.training.results import refuse_results
from shardwise.training.resuming import Start, find_start, make_way
from shardwise.training.saving import Saver
from shardwise.training.settings import TrainSettings
from shardwise.training.steps import StepFigures, Stepper, wanted_by_any
from shardwise.training.tokens import TokenRows, tokenise
from shardwise.transformers_model import TransformersModel

SCHEMA: Final = "shardwise.train/1"
EXPORT: Final = "export"
_DATA: Final = "data"

Report = Callable[[Mapping[str, Any]], None]


def train(
    settings: TrainSettings, *, report: Report, at_end: Callable[[TransformersModel], Any] | None = None
) -> dict[str, Any]:
    """Train, on every rank of the default group, which is made where there is none. All ranks call this together.

    SIGTERM makes all ranks save at the end of the step and return, also from an evaluation; see `Preemption`.

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
        CheckpointError: The model or a checkpoint cannot be read; or there is something where the export will go. If the export
            fails at the end, a checkpoint of the last step is there, and a note says where.
        DivergedError: The training has diverged: a loss, or the norm of the gradients, is not finite.
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
            DIGEST_NAME: self._data.summary.digest,
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
        start = self._resumed()
        taken = 0 if start is None else start.step
        metrics = Metrics(self._directory, steps=taken) if dist.get_rank() == 0 else None
        try:
            step, stopped = self._train_from(taken, metrics)
        finally:
            if metrics is not None:
                metrics.close()

        def saved() -> Path:
            return self._saver.save(step) if start is None or step != taken else start.directory

        checkpoint = exported = None
        if stopped or self._settings.checkpoint_every is not None:
            checkpoint = saved()
        if self._settings.export and not stopped:
            exported = self._exported(saved)
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
            "resumed_from": None if start is None else str(start.directory),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "export": None if exported is None else str(exported),
            "storage_bytes": None if load is None else load.storage_bytes,
            "seconds": round(time.perf_counter() - self._started, 3),
        }

    def _train_from(self, start: int, metrics: Metrics | None) -> tuple[int, bool]:
        """Take the steps that are left; return how many are taken, and whether it was told to stop before all was done."""
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
            self._require_finite(figures)
            self._keep(figures, metrics)
            if figures.is_save_done:
                self._saver.finish()
            if figures.is_stop_wanted or self._is_stopped_after(step, metrics, is_saved=False):
                return step, True
        return self._steps, start == self._steps and self._is_stopped_after(start, metrics, is_saved=True)

    def _is_stopped_after(self, step: int, metrics: Metrics | None, *, is_saved: bool) -> bool:
        """Do what is due after a step; return whether a rank was told to end meanwhile.

        The checkpoint comes first: whoever ends the ranks may not wait for an evaluation.
        """
        settings, is_last = self._settings, step == self._steps
        every = settings.checkpoint_every
        saves = not is_saved and every is not None and (is_last or _is_due(step, every))
        evaluates = bool(self._eval_rows) and (is_last or _is_due(step, settings.eval_every))
        if saves:
            self._note(f"writing the checkpoint of step {step}")
            (self._saver.begin if settings.async_checkpoints and not is_last else self._saver.save)(step)
        if evaluates and not self._is_evaluated(step, metrics):
            return True
        return (saves or evaluates or is_last) and self._is_stop_wanted()

    def _require_finite(self, figures: StepFigures) -> None:
        """Raise if the training has diverged, the same on all ranks, before anything of it is written over what is good."""
        figured = [figures.loss]
        if (
            figures.grad_norm is not None and self._settings.mixed_precision != "fp16"
        ):  # whose scaler passes over such steps
            figured.append(figures.grad_norm)
        if not all(map(math.isfinite, figured)):
            self._saver.finish()
            raise DivergedError(
                f"step {figures.step}: expected a finite loss and norm of the gradients, got {figures.loss} and {figures.grad_norm}: "
                "the training has diverged, and nothing was saved or exported since. Begin anew, or go on from a checkpoint of before, "
                "with a lower learning rate, more warm-up steps or other data."
            )

    def _keep(self, figures: StepFigures, metrics: Metrics | None) -> None:
        self._losses.append(figures.loss)
        if metrics is not None:
            metrics.add(figures.to_json())
        self._report({"kind": "step", "of": self._steps, **figures.to_json()})

    def _is_evaluated(self, step: int, metrics: Metrics | None) -> bool:
        """Evaluate; return whether that came to its end before a rank was told to."""
        loss = evaluate(
            self.model,
            self._data,
            self._eval_rows,
            rows_of_pass=self._rows_of_pass,
            is_stop_wanted=self._is_stop_wanted,
        )
        if loss is None:
            return False
        self._eval_loss = loss
        if metrics is not None:
            metrics.add({"step": step, "eval_loss": loss})
        self._report({"kind": "eval", "step": step, "loss": loss})
        return True

    def _is_stop_wanted(self) -> bool:
        device = torch.device(self.model.strategy.device_mesh.device_type)
        return wanted_by_any(self._preemption.is_wanted, device)

    def _tokenised(self) -> TokenRows:
        settings = self._settings
        agreement = self._agree("data")
        self._note(f"tokenising {settings.data}")
        with agreement.phase("tokenise"):
            made = None
            if agreement.rank == agreement.ranks[0]:
                made = str(
                    tokenise(
                        Path(settings.data),
                        self._directory / _DATA,
                        tokenizer_of(self.model, settings.model),
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

    def _resumed(self) -> Start | None:
        """Go on from a checkpoint, if there is one to go on from, and return it."""
        checkpoints = self._directory / CHECKPOINTS
        start = find_start(
            checkpoints,
            self._settings.resume,
            identity=self._identity,
            agree=self._agree,
            note=self._note,
        )
        self._replaces = self._settings.overwrite or start is not None
        refuse_results(
            self._directory,
            export=self._directory / EXPORT if self._settings.export else None,
            replaces_export=self._replaces,
            # Also of a run that was cut short before its first checkpoint.
            replaces_metrics=self._replaces or self._settings.resume is not None,
            agreement=self._agree("resume"),
        )
        make_way(checkpoints, start=start, agreement=self._agree("resume"), note=self._note)
        if start is not None:
            self.model.load(start.directory)
            self._note(
                f"going on from step {start.step} of {self._steps}, which {start.ranks} ranks wrote: {start.directory}"
            )
        return start

    def _exported(self, saved: Callable[[], Path]) -> Path:
        """Write the trained model; where that fails, the training is not lost with it.

        Args:
            saved: Returns the checkpoint of the last step, written unless it is there.
        """
        directory = self._directory / EXPORT
        self._note(f"writing {directory}")
        try:
            self.model.export(directory, dtype=self._settings.export_dtype, overwrite=self._replaces)
        except Exception as error:
            if isinstance(error, RankError) and not isinstance(error, PeerError):
                raise  # a rank is gone or late: the others cannot save without it
            try:
                self._note(
                    f"The export failed. The training is saved as {saved()}: --resume auto exports it."
                )
            except Exception as second:
                self._note(f"The export failed, and the training could not be saved either: {second}")
            raise
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
