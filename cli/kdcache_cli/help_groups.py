"""How `--help` is ordered: the group of each option, and an example of each command."""

from __future__ import annotations

EVERY = "Every command"
"""The group of what all commands share; it comes last."""

GROUPS: dict[str, str] = {
    "Input": """
        what sources cache source as_ tokens vocab_size teacher writer recipe corpus prompts text prompt
        text_column messages_column prompt_column completion_column tools_column documents_column ignore_columns
        chat_template split split_text min_chars drop limit_docs eos on_bad_record teacher_system tokenizer
        student align init_from pool rows where partial compare reuse
        samples start examples batches
    """,
    "Rows": "seq_len teacher_seq_len pack overlong isolate",
    "Target": """
        select k min_k top_p draws adaptive force_label sample_temperature proposal_power set positions temperatures
        extra extra_precision dump-teacher.seed plan.seed
    """,
    "Text": "max_new_tokens stop generate.temperature generate.top_p generate.seed",
    "Student": "layers hidden heads intermediate experts importance_rows",
    "Loss": "loss tail temperature position_weights soft_weight soft_schedule",
    "Training": """
        steps epochs accumulate lr warmup schedule weight_decay lora gradient_checkpointing fsdp heldout eval_every
        log_to seed
    """,
    "Store": """
        out store precision docs_per_shard chars_per_shard rows_per_shard create_only local_copy local_limit record_rows
        folder
    """,
    "Show": """
        shard row position next previous top exact csv html entries inspect-shard.rows plot.rows
        inspect-shard.compare explore.compare port open self_test watch every stage list inspect-shard.temperature
        distil.set evaluate.heldout price_per_hour students plan.epochs plan.student
    """,
    "Compute": """
        device device_map dtype attn_implementation batch_rows tile_head tensor_parallel readers
        engine engine_python engine_set
    """,
    "Work": """
        worker launch workers gpus_per_worker cpus_per_worker address grace resume save_every keep budget fetch
    """,
    EVERY: "config json log_json quiet plugin help",
}
"""The options of each group, in the order of `--help`. `COMMAND.name` is for one command, before `name` for all."""

EXAMPLES = {
    "dump-teacher": "kdcache dump-teacher --teacher Qwen/Qwen2.5-0.5B --corpus texts.jsonl --out my-cache --k 64",
    "check-data": "kdcache check-data --teacher Qwen/Qwen2.5-0.5B --corpus texts.jsonl",
    "plan": "kdcache plan --teacher Qwen/Qwen2.5-0.5B --corpus texts.jsonl --price-per-hour 2.5",
    "generate": "kdcache generate --writer Qwen/Qwen2.5-0.5B-Instruct --prompts questions.jsonl --out answers",
    "make-student": "kdcache make-student --teacher Qwen/Qwen2.5-0.5B --cache my-cache --layers every-2 --out student",
    "train-student": "kdcache train-student --cache my-cache --student student --out trained --epochs 1",
    "inspect-shard": "kdcache inspect-shard my-cache --row 0 --position 20",
    "status": "kdcache status my-cache --watch",
    "evaluate": "kdcache evaluate --student trained --cache my-cache --heldout 0.02",
    "verify": "kdcache verify my-cache",
    "convert": "kdcache convert my-cache --k 32 --out smaller-cache",
    "distil": "kdcache distil examples/recipes/laptop.toml --out run --set teacher=DIR --set corpus=texts.jsonl",
    "explore": "kdcache explore my-cache",
    "plot": "kdcache plot selections my-cache --out bytes-and-error.png",
    "export": "kdcache export my-cache --as parquet --out my-cache.parquet",
    "import": "kdcache import answers.jsonl --as topk-jsonl --out my-cache --teacher Qwen/Qwen2.5-0.5B",
    "audit": "kdcache audit their-cache --teacher Qwen/Qwen2.5-0.5B",
    "doctor": "kdcache doctor",
    "demo": "kdcache demo --out kdcache-demo",
}
"""What somebody would type, for each command."""

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


def group_of(command: str, name: str) -> str:
    """The group of an option of a command.

    Raises:
        KeyError: it stands in none.
    """
    return _GROUP_OF.get(f"{command}.{name}") or _GROUP_OF[name]


def order_of(group: str) -> int:
    """The place of a group in `--help`."""
    return list(GROUPS).index(group)
