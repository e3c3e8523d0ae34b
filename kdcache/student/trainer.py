"""transformers.Trainer with our order of rows, our loss and whole checkpoints.

Everything else (accumulation, precision, optimiser, resuming, logging, distribution) is Trainer's own; the private
names that are used of it are listed in `student.private_api`. Each term of the loss is a sum over positions divided by
those that it has in the whole optimiser step, across accumulation and ranks: labelled ones, which Trainer counts from
`shift_labels`, and ones with a target. Figures of the student come with it.

A checkpoint is complete or absent: it is written into a staging folder, flushed to the device, and renamed last. A run
that is killed while it writes one leaves a staging folder, which nothing reads and the next checkpoint clears.

`Waiting` measures the share of the training's time that a step waited for rows: the time of the loader's `next`, on
this process's clock, from the moment the first batch is there (what comes before is the start of the readers). A GPU
may still be at work while the process waits, so there the share is an upper bound of the time that it was idle.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from kdcache import stopping
from kdcache.aligned_targets import AlignedTargets
from kdcache.losses import Figures, divisor_of
from kdcache.rows import IGNORE
from kdcache.store.atomic_files import sync_folder
from kdcache.student import data_workers, resume
from kdcache.student.config import TrainConfig
from kdcache.student.data import Collator, RowDataset, Rows, RunOrder
from kdcache.student.fused_head import Auxiliary, compute_loss, fuse_head
from kdcache.student.mixture import Mixture
from kdcache.student.multi_teacher import RowReader
from kdcache.student.schedule import Schedule, ramps

T = TypeVar("T")


class Waiting:
    """Adds up, over a run, how long `next` took."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun: float | None = None
        self._waited = 0.0
        self._told = (0.0, 0.0)

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, timed; dropping this leaves the rest of them to the next who asks."""
        while True:
            asked = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self._begun is None:
                self._begun = self._clock()
                self._told = (self._begun, 0.0)
            else:
                self._waited += self._clock() - asked
            yield batch

    @property
    def seconds(self) -> float:
        """All that it took, the first batch left out."""
        return self._waited

    def share(self) -> float:
        """Of all the time since the first batch; 0 before it."""
        return 0.0 if self._begun is None else _share(self._waited, self._clock() - self._begun)

    def share_since_told(self) -> float:
        """Of the time since this was last asked."""
        (since, before), now = self._told, self._clock()
        self._told = (now, self._waited)
        return 0.0 if self._begun is None else _share(self._waited - before, now - since)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


STAGING = "checkpoint.partial"
_NAME = re.compile(r"checkpoint-(\d+)")


def complete(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in out.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def promote(staging: Path, out: Path, keep: int) -> None:
    """Give a staged checkpoint its place, then forget all but the newest `keep`."""
    (written,) = complete(staging)
    for folder, _, names in os.walk(written):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    place = out / written.name
    if place.exists():  # the same step, made again after a resume from an older checkpoint
        shutil.rmtree(place)
    written.rename(place)
    sync_folder(out)
    for old in complete(out)[:-keep]:
        shutil.rmtree(old)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains a student on rows of one cache or several.

    Args:
        model: a causal language model.
        caches: where the rows and targets are; alike, see `student.sources`.
        rows: the rows of each to train on.
        mixture: their order.
        config: seed, checkpoints to keep, and whether to write down which rows were read.
        schedule: the objective of each step, and how much each position counts.
        args: Trainer's own arguments; `max_steps` decides how many rows are read.
        callbacks: as for Trainer.
        first_step: steps that the checkpoint to resume from has done.
        auxiliary: gives a further term of the loss, see `fused_head.Auxiliary`.

    Attributes:
        positions: labelled positions that this process has trained on.
        waiting: how long it waited for rows.
    """

    def __init__(
        self,
        model: Any,
        caches: Sequence[RowReader],
        rows: Sequence[Rows],
        mixture: Mixture,
        config: TrainConfig,
        schedule: Schedule,
        args: TrainingArguments,
        callbacks: list[Any],
        first_step: int = 0,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=RowDataset(caches, rows),
            data_collator=Collator(caches),
            callbacks=callbacks,
        )
        if use_cache is not None:  # Trainer turns it off, and would save it so; packed_forward does without in any case
            model.config.use_cache = use_cache
        self.remove_callback(PrinterCallback)  # only the command line prints
        self.vocab, self.mixture, self.first_step = caches[0].row_spec.vocab_size, mixture, first_step
        self.config, self.schedule, self.waiting = config, schedule, Waiting()
        self.head, self.auxiliary = fuse_head(model, args.device), auxiliary
        self.positions = 0
        self._sums: dict[str, torch.Tensor] = {}
        self.model_accepts_loss_kwargs = True  # so that positions are counted for any architecture
        self.loss_is_scaled_for_ga = True  # our loss is divided by that count

    def _get_train_sampler(self, train_dataset: Any = None) -> RunOrder:  # noqa: ARG002 - Trainer's signature
        args = self.args
        a_step = args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        return RunOrder(self.mixture, args.max_steps * a_step, self.first_step * a_step)

    def get_train_dataloader(self) -> Any:
        """Trainer's own loader, its workers detached."""
        return data_workers.detached(super().get_train_dataloader())

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """`[2]` labelled positions of the whole step, and those with a target: Trainer's own count of each."""
        count = super()._get_num_items_in_batch
        marks = [torch.where(batch["targets"].has_target, 0, IGNORE) for batch in batch_samples]
        items = count(batch_samples, device)
        targets = count([{"labels": mark, "shift_labels": mark} for mark in marks], device)
        return None if items is None else torch.stack([items, targets])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Trainer's own, with the time that the loader takes."""
        with stopping.shielded():  # readers are started when the first batch is asked for
            return super().get_batch_samples(self.waiting.watch(epoch_iterator), num_batches, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Distillation and label loss of one micro-batch, divided by the positions of the whole step."""
        if self.config.record_rows:
            path = Path(self.args.output_dir) / f"rows-{self.args.process_index}.jsonl"
            resume.append(path, {"step": self.state.global_step + 1, "rows": inputs["rows"].tolist()})
        self.positions += len(inputs["targets"].count)
        items = None
        if num_items_in_batch is not None:  # DDP averages over ranks what must be summed
            items = num_items_in_batch / self.accelerator.num_processes
        figures = Figures()
        loss = compute_loss(
            model, self.head, inputs, self.schedule.at(self.state.global_step),
            vocab_size=self.vocab, num_items=items, weights=self.schedule.weights, figures=figures,
            auxiliary=self.auxiliary,
        )  # fmt: skip
        self._add(figures.values(), inputs["targets"])
        return (loss, {}) if return_outputs else loss

    def _add(self, figures: dict[str, torch.Tensor], targets: Any) -> None:
        found = {**figures, "positions": torch.ones_like(figures["nll"])}
        if isinstance(targets, AlignedTargets):
            found |= {name: getattr(targets, name).to(figures["nll"]) for name in ("chunk_bytes", "label_bytes")}
        for name, values in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + values.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures, and means of ours over the positions of all ranks since the last call."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]))
            totals = dict(zip(names, sums.tolist(), strict=True))
            if "label_bytes" in totals:
                logs["aligned_bytes"] = totals.pop("chunk_bytes") / max(1.0, totals.pop("label_bytes"))
            for name, total in totals.items():
                if (divisor := divisor_of(name)) is not None:
                    logs[name] = total / max(1.0, totals[divisor])
            logs["data_wait_share"] = self.longest(self.waiting.share_since_told())
            self._sums = {}
        super().log(logs, start_time)

    def longest(self, share: float) -> float:
        """The greatest share of all ranks: each step waits for the slowest of them."""
        shares = self.accelerator.gather(torch.tensor([share], device=self.args.device, dtype=torch.float32))
        return float(shares.max())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's own; where another number of ranks wrote the checkpoint, seeds of (seed, step, rank) instead."""
        args = self.args
        wrote = len(list(Path(checkpoint).glob("rng_state*.pth"))) if checkpoint else args.world_size
        if wrote == args.world_size:
            super()._load_rng_state(checkpoint)
        else:  # Trainer would leave every rank with the seed that the run began with
            key = (self.config.seed, self.state.global_step, args.process_index)
            set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002 - Trainer's signature
        return str(Path(self.args.output_dir) / STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        out, staging = Path(self.args.output_dir), Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            promote(staging, out, self.config.keep)
            shutil.rmtree(staging, ignore_errors=True)


def arguments(config: TrainConfig, steps: int, device: torch.device, remote: bool) -> TrainingArguments:
    """Trainer's arguments for a run; `remote` says whether reading the cache crosses a network."""
    warmup, descent = ramps(config, steps)
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "cosine": ("cosine", {}),
        "constant": ("constant_with_warmup", {}),
        "wsd": ("warmup_stable_decay", {"num_decay_steps": descent}),
    }
    scheduler, scheduler_options = schedules[config.schedule]
    bf16 = config.dtype == "bfloat16" or (
        config.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return TrainingArguments(
        output_dir=config.out,
        max_steps=steps,
        per_device_train_batch_size=config.batch_rows,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=scheduler_options,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=config.seed,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        save_strategy="steps",
        save_steps=config.save_every,
        logging_strategy="steps",
        logging_steps=max(1, min(50, steps // 20)),
        logging_nan_inf_filter=False,  # a NaN must show, not be averaged away
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        dataloader_num_workers=data_workers.how_many(config.readers, remote),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=config.trackers() or "none",
        **_memory(config),
    )


def _memory(config: TrainConfig) -> dict[str, Any]:
    """Trainer's arguments for what is kept where: recomputation, and sharding by FSDP2."""
    if config.fsdp:  # which has a recomputation of its own
        return {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": config.gradient_checkpointing}}
    # The option had another name before it was this one.
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    settings = {"use_reentrant": False} if config.gradient_checkpointing else None
    return {f"{name}_checkpointing": config.gradient_checkpointing, f"{name}_checkpointing_kwargs": settings}
