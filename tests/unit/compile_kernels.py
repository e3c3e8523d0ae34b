"""Compile the kernels of a selection for NVIDIA GPUs of some generations, none of which need be here.

python compile_kernels.py 80 90

As they are asked for with bfloat16 logits of 128,256 ids, a head of 64 and temperatures 1 and 2.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdcache.selection import scan_triton

TYPES = {
    "x": "*bf16", "scales": "*fp32", "sums": "*fp32", "entropy_terms": "*fp32", "values": "*fp32", "outside": "*i64",
    "peaks": "*i32", "chosen": "*i32", "borders": "*i32", "near": "*i32", "near_ids": "*i32", "centres": "*i32",
}  # fmt: skip
SIZES: dict[str, tuple[dict[str, int], int]] = {  # and the warps of a program
    "look": ({"temperatures": 2, "chunk": 64}, 4),
    "choose": ({"span": 2048}, scan_triton._warps(2048)),
    "rank": ({"temperatures": 2, "span": 128}, scan_triton._warps(128 * 64)),
    "finish": ({"temperatures": 2, "span": 2048, "width": 128}, scan_triton._warps(2048)),
}
ALIGNED = ("stride", "vocab")  # multiples of 16, as all addresses are


def main() -> None:
    for gpu in sys.argv[1:]:
        for name, (sizes, warps) in SIZES.items():
            kernel = getattr(scan_triton, f"_{name}")
            types = TYPES | {"ids": "*i64" if name == "finish" else "*i32"}
            source = ASTSource(
                fn=kernel,
                signature={arg: "constexpr" if arg in sizes else types.get(arg, "i32") for arg in kernel.arg_names},
                constexprs={(kernel.arg_names.index(arg),): size for arg, size in sizes.items()},
                attrs={
                    (i,): [["tt.divisibility", 16]]
                    for i, arg in enumerate(kernel.arg_names)
                    if arg in ALIGNED or (arg in types and arg not in sizes)
                },
            )
            made = triton.compile(source, target=GPUTarget("cuda", int(gpu), 32), options={"num_warps": warps})
            assert made.asm["cubin"]
            sys.stdout.write(f"{name}:{gpu}\n")


if __name__ == "__main__":
    main()
