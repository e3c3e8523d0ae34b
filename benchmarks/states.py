"""What each precision of hidden states costs: bytes a token, relative error, and the KL of what the head makes of them.

    python -m benchmarks.states [--teacher NAME] [--text FILE] [--tokens 512] [--layers 0,1,6,12,20,29,30] [--json FILE]

The teacher is SmolLM2-135M-Instruct, fetched by pip, unless one is named. One piece of text is read. The error of a
vector is |x - stored x| / |x|, in the Euclidean norm; `others` is the same without the four largest numbers of each
vector, which is what a student that looks at many channels sees. KL is from the model's own distribution to that of its
head on the stored `hidden:-1`, float64. `one scale` is int8 without the numbers apart, for comparison.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import write
from kdcache.demo.smollm2 import fetch_smollm2
from kdcache.extras import ExtraSpec
from kdcache.isolation import packed_forward
from kdcache.pretrained import load_model, load_tokenizer, model_folder
from kdcache.teacher.engines.layer_states import LayerStates
from kdcache.teacher.engines.tiled_head import TiledHead

Floats = NDArray[np.float32]

PRECISIONS = ("float16", "bfloat16", "int8", "one scale")


@torch.inference_mode()
def states_of(model: torch.nn.Module, tokens: torch.Tensor, layers: list[int]) -> dict[str, Floats]:
    """`[n, W]` after each of the layers, and what the head is given."""
    places = torch.arange(tokens.shape[1])[None]
    with LayerStates(model).caught(layers) as caught:
        last = TiledHead(model, "cpu").hidden(tokens, places)[0]
    return {**{f"hidden:{number}": caught[number][0].numpy() for number in layers}, "hidden:-1": last.numpy()}


def stored(values: Floats, precision: str) -> tuple[Floats, float]:
    """What comes back, and bytes a vector."""
    if precision == "one scale":
        scale = np.abs(values).max(-1, keepdims=True) / 127
        return (np.rint(values / scale) * scale).astype(np.float32), values.shape[1] + 4.0
    spec = ExtraSpec(width=values.shape[1], precision=precision)
    streams = spec.encode(values)
    return spec.decode(streams, len(values)), sum(each.nbytes for each in streams.values()) / len(values)


def relative(off: Floats, values: Floats) -> tuple[float, float]:
    """Mean and largest."""
    each = np.linalg.norm(off, axis=-1) / np.linalg.norm(values, axis=-1)
    return float(each.mean()), float(each.max())


@torch.inference_mode()
def kl(model: torch.nn.Module, own: torch.Tensor, states: Floats, temperature: float) -> float:
    """Mean KL in nats from `[n, V]` logits to those that the head makes of `[n, W]` states."""
    made = TiledHead(model, "cpu").logits(torch.from_numpy(states)).double()
    p, q = (torch.log_softmax(each / temperature, -1) for each in (own.double(), made))
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    assets = Path(os.environ.get("KDCACHE_ASSETS", "."))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", help="a checkpoint; SmolLM2-135M-Instruct if none is named")
    parser.add_argument("--text", default=str(assets / "text/wikitext2-test.txt"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", default="0,1,6,12,20,29,30")
    parser.add_argument("--json", help="a file for the results")
    options = parser.parse_args()
    folder = fetch_smollm2() if options.teacher is None else model_folder(options.teacher, "teacher")
    model = load_model(folder, "teacher", "float32", torch.device("cpu")).eval()
    text = Path(options.text).read_text()[: 20 * options.tokens]
    tokens = torch.tensor([load_tokenizer(folder)(text)["input_ids"][: options.tokens]])
    states = states_of(model, tokens, [int(part) for part in options.layers.split(",")])
    with torch.inference_mode():
        own = packed_forward(model, tokens, torch.arange(tokens.shape[1])[None]).logits[0]
    results = []
    print(f"{'':10} {'precision':10} {'bytes':>6} {'mean':>8} {'largest':>8} {'others':>8} {'KL, T=1':>9} {'T=2':>9}")
    for name, values in states.items():
        large = np.argpartition(-np.abs(values), 3, axis=-1)[:, :4]
        for precision in PRECISIONS:
            back, size = stored(values, precision)
            mean, largest = relative(back - values, values)
            off, rest = (each.copy() for each in (back - values, values))
            for each in (off, rest):
                np.put_along_axis(each, large, 0, -1)
            found = {"bytes": size, "mean": mean, "largest": largest, "others": relative(off, rest)[0]}
            divergences = [kl(model, own, back, t) for t in (1.0, 2.0)] if name == "hidden:-1" else []
            print(
                f"{name:10} {precision:10} {size:6.0f} {mean:8.4f} {largest:8.4f} {found['others']:8.4f} "
                + " ".join(f"{each:9.2e}" for each in divergences)
            )
            results.append({"extra": name, "precision": precision, **found, "kl": divergences})
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "text")}
    write(options.json, "cpu", {**settings, "text": Path(options.text).name}, results)


if __name__ == "__main__":
    main()
