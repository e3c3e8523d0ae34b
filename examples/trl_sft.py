"""Train a student from a cache with TRL's SFTTrainer: its options and its LoRA, our rows and our loss.

    python examples/trl_sft.py CACHE STUDENT OUT STEPS

The dataset holds the indices of the rows, and the collator reads the rows, so targets never become columns of a table.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from kdcache import open_cache
from kdcache.losses import Objective
from kdcache.student import Collator, RowDataset, compute_loss, count_items, fuse_head, load_student, save_student


class DistillingSFTTrainer(SFTTrainer):
    """SFTTrainer with the distillation loss of a cache."""

    def __init__(self, model, cache, objective, **options):
        rows, collate = RowDataset([cache], [range(len(cache))]), Collator([cache])
        super().__init__(
            model,
            train_dataset=Dataset.from_dict({"row": range(len(cache))}),
            data_collator=lambda examples: collate([rows[example["row"]] for example in examples]),
            processing_class=AutoTokenizer.from_pretrained(cache.tokenizer_path),
            **options,
        )
        self.cache, self.objective = cache, objective
        self.head = fuse_head(self.model, self.args.device)
        self.loss_is_scaled_for_ga = True  # divided by the positions of the whole step

    def _get_num_items_in_batch(self, batch_samples, device):
        return self.accelerator.reduce(sum(count_items(batch) for batch in batch_samples).to(device))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        items = None if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = compute_loss(
            model, self.head, inputs, self.objective, vocab_size=self.cache.manifest.vocab_size, num_items=items
        )
        return (loss, {}) if return_outputs else loss


def main(cache_path, student, out, steps, peft_config=None, **more):
    cache = open_cache(cache_path)
    usual = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    args = SFTConfig(
        out, max_steps=steps, bf16=torch.cuda.is_available(), report_to="none", remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True}, **{**usual, **more},  # rows are packed already
    )  # fmt: skip
    model = load_student(student, cache, args.device, seed=0)
    trainer = DistillingSFTTrainer(model, cache, Objective(soft_weight=0.9), args=args, peft_config=peft_config)
    trainer.train()
    save_student(trainer.accelerator.unwrap_model(trainer.model), cache, out)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4], steps=int(sys.argv[4]))
