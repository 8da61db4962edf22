# SPDX-License-Identifier: Apache-2.0
"""Flags of the benchmark and each case's defaults. Imports no JAX: the process is pinned first."""

import argparse
import os
import sys

QWEN3_1_7B, QWEN3_8B = "2048,28,16,8,128,6144", "4096,36,32,8,128,12288"
CASES = {  # case -> what it measures, and its own defaults
    "step": ("the whole step, every stage", {}),
    "update": ("the update with everything supervised", {}),
    "crop": (
        "the update at several supervised fractions",
        dict(new_tokens=512, objective="paper", repeats=3),
    ),
    "decode": ("one token step of the sampler", {}),
    "sampler": ("slots under heavy-tailed lengths", dict(vocab=4096, new_tokens=256, repeats=1)),
    "score": ("the teacher pass", {}),
    "loss_memory": (
        "temporary memory of loss and gradient on a TPU that need not be there",
        dict(
            student=QWEN3_1_7B,
            teacher=QWEN3_8B,
            new_tokens=1024,
            dtype="bfloat16",
            topology="v5e:2x2",
        ),
    ),
    "host": (
        "segmentation and selection, and how much of it the device waits for",
        dict(
            rows=1024,
            new_tokens=4096,
            repeats=1,
            threads=0,
            topology="v5e:4x4",
            config="configs/paper.py:1.7b",
        ),
    ),
    "compile": ("compiling a config's step, cold and from the cache", dict(threads=0)),
}


DIMS = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn")


def dims(text: str) -> dict[str, int]:
    """Flag type of --student and --teacher."""
    parts = text.split(",")
    if len(parts) != len(DIMS) or not all(p.isdigit() for p in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be {','.join(DIMS)}; for example 256,4,4,2,64,768"
        )
    return dict(zip(DIMS, map(int, parts), strict=True))


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m launch.bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cases = "; ".join(f"{name}: {text}" for name, (text, _) in CASES.items())
    p.add_argument("--case", choices=tuple(CASES), required=True, help=cases)
    p.add_argument("--json", action="store_true", help="print only the JSON object")
    p.add_argument(
        "--student", type=dims, default="256,4,4,2,64,768", help=",".join(DIMS) + " of the student"
    )
    p.add_argument("--teacher", type=dims, default="512,8,8,4,64,1536")
    p.add_argument("--vocab", type=int, default=151936, help="tokens")
    p.add_argument("--batch", type=int, default=8, help="rows, or slots in case sampler")
    p.add_argument("--rows", type=int, default=128, help="rows of cases sampler and host")
    p.add_argument("--prompt_len", type=int, default=32, help="tokens")
    p.add_argument("--new_tokens", type=int, default=128, help="response tokens of a row, at most")
    p.add_argument("--dtype", default="float32", help="of weights and matmuls")
    p.add_argument("--head_dtypes", default="float32,bfloat16", help="of the head, case decode")
    p.add_argument("--decode_chunk", type=int, default=32, help="steps between host checks")
    p.add_argument("--head_chunk", type=int, default=128, help="tokens whose logits exist at once")
    p.add_argument(
        "--micro_batch_rows", type=int, default=0, help="packed rows; 0 = chosen by the sizes"
    )
    p.add_argument("--micro_batch_tokens", type=int, default=0, help="of a packed row; 0 = chosen")
    p.add_argument("--remat", default="none", help="none, dots or layer")
    p.add_argument(
        "--unroll", type=int, default=-1, help="most layers that are not scanned; -1 = as in a run"
    )
    p.add_argument("--objective", default="reverse_kl", help="reverse_kl, forward_kl, jsd or paper")
    p.add_argument("--warmup", type=int, default=1, help="calls before the clock starts")
    p.add_argument("--repeats", type=int, default=5, help="timed calls; the median is reported")
    p.add_argument("--threads", type=int, default=1, help="CPUs to use; 0 = all")
    p.add_argument("--workers", type=int, default=2, help="processes that segment, case host")
    p.add_argument("--config", default="configs/quickstart.py", help="of cases compile and host")
    p.add_argument("--topology", default="", help="TPU slice of cases loss_memory and host")
    p.add_argument("--devices", type=int, default=1, help="devices to use; 0 = all")
    p.add_argument("--seed", type=int, default=0)
    return p


def parse(argv: list[str], description: str = "") -> argparse.Namespace:
    p = parser(description)
    if (case := p.parse_known_args(argv)[0].case) in CASES:
        p.set_defaults(**CASES[case][1])
    return p.parse_args(argv)


def pin(threads: int) -> None:
    """Leaves this process the last `threads` CPUs. JAX sizes its thread pool by what it sees."""
    cpus = sorted(os.sched_getaffinity(0))
    if not 0 <= threads <= len(cpus):
        sys.exit(f"ERROR: --threads={threads} must be 0 (all) to {len(cpus)}, the CPUs there are.")
    if threads:
        os.sched_setaffinity(0, cpus[-threads:])
