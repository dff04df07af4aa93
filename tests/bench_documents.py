"""Documents as `pagedattn bench --json` prints them, made by hand for the tests of plots and pages.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

CEILINGS = {
    "read": 3.12e12, "copy": 2.44e12, "matmul": 694e12, "host_to_device": 55e9, "device_to_host": 55e9,
    "launch": 1.4e-6,
}  # fmt: skip
MACHINE = {"device": "Sample accelerator 80 GB", "driver": "580.1", "clocks": "1980 MHz, memory 2619 MHz"}
PEERS = [
    {"name": "fa3", "title": "FlashAttention-3", "version": "3.0.1", "missing": None},
    {"name": "flashinfer", "title": "FlashInfer", "version": "0.7.2", "missing": None},
    {"name": "contiguous", "title": "torch SDPA, contiguous", "version": "torch 2.11.0", "missing": None},
    {"name": "vllm", "title": "vLLM", "version": None, "missing": "vllm is not installed"},
]

# Bytes, operations, then the microseconds of ours and of the three peers that are there.
DECODE: dict[str, tuple[float, float, list[float | None]]] = {
    "dec_b1_128": (0.54e6, 2.1e6, [6.1, 11.1, 7.3, 6.9]),
    "dec_b1_1k": (4.2e6, 16.8e6, [9.4, 13.2, 11.1, 10.4]),
    "dec_b1_8k": (33.6e6, 134e6, [20.6, 24.4, 21.5, 21.9]),
    "dec_b1_64k": (268e6, 1.07e9, [97.0, 103.5, 100.4, 96.5]),
    "dec_b8_4k": (134e6, 537e6, [51.5, 57.3, 56.2, 52.9]),
    "dec_b64_4k": (1.075e9, 4.29e9, [356.0, 365.0, 362.0, 353.0]),
    "dec_b128_1k": (539e6, 2.15e9, [182.0, 199.0, 187.0, 183.0]),
    "dec_b256_512": (541e6, 2.15e9, [184.0, 198.0, 191.0, 184.0]),
    "dec_logn64": (992e6, 3.97e9, [341.0, 386.0, 438.0, None]),
    "dec_skew32": (301e6, 1.2e9, [102.0, 115.0, 124.0, None]),
    "dec_mha_b32_2k": (1.074e9, 1.07e9, [358.0, 362.0, 360.0, 353.0]),
    "dec_g8_b64_8k": (2.149e9, 17.2e9, [720.0, 711.0, 713.0, 700.0]),
    "dec_b64_4k_fp8": (538e6, 4.29e9, [199.0, None, 247.0, None]),
    "spec_64x4@4k": (1.078e9, 17.2e9, [372.0, 367.0, 363.0, None]),
}
PREFILL: dict[str, tuple[float, float, list[float | None]]] = {
    "pre_1x8k": (168e6, 550e9, [1030.0, 952.0, 1074.0, 1013.0]),
    "pre_4x4k": (336e6, 550e9, [1080.0, 1021.0, 1194.0, 1089.0]),
    "pre_16x1k": (336e6, 137e9, [349.0, 351.0, 380.0, 391.0]),
    "pre_8x512@8k": (336e6, 533e9, [980.0, 921.0, 1026.0, None]),
    "pre_1x16k": (336e6, 2199e9, [4010.0, 3771.0, 4110.0, 3804.0]),
    "pre_1x8k_p64": (168e6, 550e9, [1010.0, 951.0, 1087.0, 1021.0]),
    "pre_1x8k_p128": (168e6, 550e9, [960.0, 904.0, 1094.0, 1026.0]),
}


def bench_document() -> dict[str, Any]:
    """14 decode and 7 prefill cases, ours and three peers, one of which cannot do all."""
    cases = [
        _case(name, kind, *facts)
        for kind, group in (("decode", DECODE), ("prefill", PREFILL))
        for name, facts in group.items()
    ]
    return {
        "schema": 1, "pagedattn": "0.1.dev7+g0123abc", "date": "2026-01-02T03:04:05+00:00", "backend": "cuda",
        "machine": dict(MACHINE), "ceilings": dict(CEILINGS), "peers": [dict(peer) for peer in PEERS], "cases": cases,
    }  # fmt: skip


def _case(name: str, kind: str, num_bytes: float, flops: float, micros: list[float | None]) -> dict[str, Any]:
    names = ["pagedattn", *(peer["name"] for peer in PEERS if peer["missing"] is None)]
    results = [
        _result(str(peer), num_bytes, flops, time * 1e-6)
        if time is not None
        else {"peer": peer, "reason": "no operation for this case"}
        for peer, time in zip(names, micros, strict=True)
    ]
    shape = "64 x 4096 tokens, 32/8 heads of 128, blocks of 16, bfloat16"
    return {"name": name, "shape": shape, "kind": kind, "bytes": num_bytes, "flops": flops, "results": results}


def _result(peer: str, num_bytes: float, flops: float, seconds: float) -> dict[str, Any]:
    memory, compute = num_bytes / CEILINGS["read"], flops / CEILINGS["matmul"]
    return {
        "peer": peer, "seconds": seconds, "low": 0.99 * seconds, "high": 1.02 * seconds, "samples": [seconds] * 3,
        "method": "graph difference" if seconds < 50e-6 else "events", "error": 2.1e-3,
        "bytes_per_second": num_bytes / seconds, "flops_per_second": flops / seconds,
        "bound": "memory" if memory > compute else "compute", "share": max(memory, compute) / seconds,
        "host_seconds": 8e-6 if peer == "pagedattn" else 26e-6, "host_median": 9e-6 if peer == "pagedattn" else 30e-6,
    }  # fmt: skip
