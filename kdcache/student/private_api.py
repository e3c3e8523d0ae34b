"""The private names of transformers and accelerate that a run uses, all in one list: they may change at any time.

A name here is overridden, called or set by `student.trainer`, `student.train`, `student.data_workers`, `student.model`
or `pretrained`. tests/student/test_private_api.py fails when a signature differs from what is written here, or
when a name no longer does what it is needed for. The versions with which it passed are the bounds of
transformers and accelerate in pyproject.toml. Whoever raises a bound runs that test first.
"""

from __future__ import annotations

from dataclasses import dataclass

_TRAINER = "transformers.Trainer"


@dataclass(frozen=True)
class PrivateName:
    """One name that is not public.

    Attributes:
        owner: the class that has it.
        name: of the method or attribute.
        parameters: names of a method's parameters, `self` left out; None for an attribute.
        why: what it is needed for.
    """

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    why: str


PRIVATE_NAMES = (
    PrivateName(
        _TRAINER, "_get_train_sampler", ("train_dataset",),
        "overridden: the rows of a run come in the order of `RunOrder`, which skips what a resumed run has done",
    ),
    PrivateName(
        _TRAINER, "_get_num_items_in_batch", ("batch_samples", "device"),
        "overridden and called: counts the labels of an optimiser step over accumulation and ranks, from "
        "`shift_labels`; called once more to count the positions that have a target",
    ),
    PrivateName(
        _TRAINER, "get_batch_samples", ("epoch_iterator", "num_batches", "device"),
        "overridden: the time that `next` of the loader takes is measured around it",
    ),
    PrivateName(
        _TRAINER, "_load_rng_state", ("checkpoint",),
        "overridden: where another number of ranks wrote a checkpoint, each rank takes a seed of its own",
    ),
    PrivateName(
        _TRAINER, "_get_output_dir", ("trial",),
        "overridden: `_save_checkpoint` writes below it, into a staging folder that is renamed when it is whole",
    ),
    PrivateName(
        _TRAINER, "_save_checkpoint", ("model", "trial"),
        "overridden: gives the staged checkpoint its place when Trainer has written it",
    ),
    PrivateName(
        _TRAINER, "model_accepts_loss_kwargs", None,
        "set to True: Trainer then counts the labels of a step for any architecture",
    ),
    PrivateName(
        _TRAINER, "loss_is_scaled_for_ga", None,
        "set to True: the loss is divided by that count already, and not once more by the accumulation "
        "(5.17 does not know it, and goes by `model_accepts_loss_kwargs`)",
    ),
    PrivateName(
        "transformers.TrainingArguments", "_n_gpu", None,
        "set to 1 at most: several GPUs in one process would mean DataParallel",
    ),
    PrivateName(
        "transformers.PreTrainedModel", "all_tied_weights_keys", None,
        "read: names of tied weights, each of which is saved once",
    ),
    PrivateName(
        "transformers.PreTrainedModel", "_adjust_missing_and_unexpected_keys", ("loading_info",),
        "wrapped while a model is loaded: it is given every weight that was not taken up, and then leaves out those "
        "of which transformers does not warn",
    ),
    PrivateName(
        "transformers.PreTrainedModel", "_get_dtype_plan", ("dtype",),
        "called: names of parameters that an architecture keeps in float32",
    ),
    PrivateName(
        "transformers.PreTrainedConfig", "_attn_implementation", None,
        "read: which attention a model runs, so that one that caps its attention logits is not run by `sdpa`",
    ),
    PrivateName(
        "accelerate.data_loader.DataLoaderShard", "base_dataloader", None,
        "read: the DataLoader inside a prepared one, whose workers are made to share nothing with this process",
    ),
)  # fmt: skip
