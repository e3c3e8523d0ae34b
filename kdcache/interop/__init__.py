"""Interoperation: caches as other tools keep them, written, read, and turned into caches of kdcache.

    formats.py      the table of formats, and the protocols of a reader and a writer
    export.py       a cache in another format
    import_rows.py  another tool's cache into a cache
    pieces.py       the rows of a cache as single sequences; token_rows.py the ids of a cache that keeps none
    foreign_row.py  what every reader gives: one sequence and its entries
    records.py      JSON lines, Parquet and Arrow files of records, in parts; listed_records.py those with a list for
                    each token

One format a file:

    row_table.py, tables.py    Parquet, Arrow and JSON lines of plain numbers
    zarr_arrays.py             zarr arrays of plain numbers
    distillkit.py              DistillKit, with distillkit_codec.py for its bytes
    megatron.py                Megatron's cached logits
    topk_jsonl.py              JSON lines of a server's answers
    axolotl.py                 axolotl's data sets
    maxtext.py                 MaxText's saved logits, with array_record.py for the files
    sekd.py                    the offline caches of SE-KD
    own.py                     kdcache's own, as a reader gives it

torch_file.py reads what `torch.save` wrote, pickled_data.py pickled numbers, and neither runs anything of it.
"""
