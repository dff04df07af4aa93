# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes of attention calls, the work each of them is, and the named ones that peers are known by."""

from __future__ import annotations

from dataclasses import dataclass

from pagedattn._device import DTYPES, FP8_DTYPES, ITEM_SIZE, out_dtype

from .lengths import parse_lengths
from .model_shape import check_heads

LAYOUTS = ("NHD", "HND")


class CaseError(ValueError):
    """A case cannot be; the message names the option."""


@dataclass(frozen=True, slots=True)
class Case:
    """One attention call.

    Attributes
    ----------
    name : str
        What tables and plots call it.
    kv_lens : tuple of int
        Tokens of each sequence in the cache, its query tokens included.
    q_lens : tuple of int
        Query tokens of each sequence: 1 is decode, a few are speculative decode, all of them prefill.
    heads, kv_heads, head_dim, block_size : int
        Query heads, KV heads, head dimension, tokens a block.
    dtype : str
        Type of q and, unless it is float8, of out.
    kv_dtype : str
        Type of the cache: `dtype`, or float8_e4m3 or float8_e5m2 with a 16-bit one.
    causal : bool
        Whether a query token sees only the tokens up to its own.
    window : int, optional
        How many of them it sees, the last ones; None is all.
    layout : str
        How a block lies in memory: NHD, token by token, or HND, head by head.
    """

    name: str
    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    layout: str = "NHD"

    def __post_init__(self) -> None:
        if not self.kv_lens or len(self.kv_lens) != len(self.q_lens):
            raise CaseError(f"{self.name}: {len(self.kv_lens)} sequences, but {len(self.q_lens)} query lengths")
        for q_len, kv_len in zip(self.q_lens, self.kv_lens, strict=True):
            if not 1 <= q_len <= kv_len:
                raise CaseError(f"{self.name}: query lengths must be 1 to the sequence's {kv_len} tokens; got {q_len}")
        for field in ("heads", "kv_heads", "block_size"):
            if getattr(self, field) < 1:
                raise CaseError(f"--{field.replace('_', '-')} must be at least 1; got {getattr(self, field)}")
        check_heads(self.heads, self.kv_heads, self.head_dim, CaseError)
        if self.dtype not in (*DTYPES, *FP8_DTYPES):
            raise CaseError(f"--dtype must be one of {', '.join((*DTYPES, *FP8_DTYPES))}; got {self.dtype}")
        is_16bit = ITEM_SIZE[self.dtype] == 2
        if self.kv_dtype != self.dtype and not (is_16bit and self.kv_dtype in FP8_DTYPES):
            allowed = ", ".join((self.dtype, *FP8_DTYPES)) if is_16bit else self.dtype
            raise CaseError(f"--kv-dtype must be one of {allowed} with --dtype {self.dtype}; got {self.kv_dtype}")
        if self.window is not None and self.window < 1:
            raise CaseError(f"{self.name}: the window must be at least 1; got {self.window}")
        if self.layout not in LAYOUTS:
            raise CaseError(f"{self.name}: the layout must be one of {', '.join(LAYOUTS)}; got {self.layout}")

    @property
    def out_dtype(self) -> str:
        """Type of out."""
        return out_dtype(self.dtype)

    @property
    def num_blocks(self) -> int:
        """Blocks that the sequences take."""
        return sum(-(-length // self.block_size) for length in self.kv_lens)

    @property
    def cache_bytes(self) -> int:
        """Bytes of K and V, unused slots included."""
        return 2 * self.num_blocks * self.block_size * self.kv_heads * self.head_dim * ITEM_SIZE[self.kv_dtype]

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that the call must read: each slot that a query token sees, once."""
        slots = sum(kv_len - self.visible_keys(index, 0)[0] for index, kv_len in enumerate(self.kv_lens))
        return 2 * slots * self.kv_heads * self.head_dim * ITEM_SIZE[self.kv_dtype]

    @property
    def bytes(self) -> int:
        """Bytes the call must move: K, V and q read once, out written once."""
        rows = sum(self.q_lens) * self.heads
        return self.kv_bytes + rows * self.head_dim * (ITEM_SIZE[self.dtype] + ITEM_SIZE[self.out_dtype])

    @property
    def flops(self) -> int:
        """Operations of both matrix products over the visible keys; a multiply and an add count two."""
        seen = sum(map(self._keys_seen, self.q_lens, self.kv_lens))
        return 4 * self.heads * self.head_dim * seen

    @property
    def is_decode(self) -> bool:
        """Whether reading the cache bounds it (a few query tokens a sequence), not arithmetic."""
        return max(self.q_lens) <= 16

    @property
    def shape(self) -> str:
        """The case in one line: lengths, heads, head dimension, block size, types and what else is unusual."""
        q_lens = "" if max(self.q_lens) == 1 else f"{_brief(self.q_lens)} new of "
        dtype = self.dtype if self.kv_dtype == self.dtype else f"{self.dtype} with {self.kv_dtype} cache"
        layout = "" if self.layout == "NHD" else f" in {self.layout}"
        window = "" if self.window is None else f", window of {self.window}"
        return (
            f"{q_lens}{_brief(self.kv_lens)} tokens, {self.heads}/{self.kv_heads} heads of {self.head_dim}, "
            f"blocks of {self.block_size}{layout}, {dtype}{window}"
        )

    def visible_keys(self, sequence: int, token: int) -> tuple[int, int]:
        """The keys of a sequence that one of its query tokens sees: the first, and one past the last."""
        kv_len = self.kv_lens[sequence]
        end = kv_len - self.q_lens[sequence] + token + 1 if self.causal else kv_len
        return 0 if self.window is None else max(0, end - self.window), end

    def _keys_seen(self, q_len: int, kv_len: int) -> int:
        """Keys that the query tokens of a sequence see, summed over the tokens."""
        window = kv_len if self.window is None else min(self.window, kv_len)
        if not self.causal:
            return q_len * window

        def by_first(tokens: int) -> int:
            growing = min(tokens, window)
            return growing * (growing + 1) // 2 + (tokens - growing) * window

        return by_first(kv_len) - by_first(kv_len - q_len)


def _brief(lengths: tuple[int, ...]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{len(lengths)} x {low}" if low == high else f"{len(lengths)} x {low} to {high}"


def decode(name: str, lengths: str, **fields: int | str) -> Case:
    """A case with one query token a sequence."""
    kv_lens = parse_lengths(lengths)
    return Case(name, kv_lens, (1,) * len(kv_lens), **fields)  # type: ignore[arg-type]


def prefill(name: str, q_lengths: str, lengths: str, **fields: int | str) -> Case:
    """A case with many query tokens a sequence."""
    return Case(name, parse_lengths(lengths), parse_lengths(q_lengths), **fields)  # type: ignore[arg-type]


DECODE = (
    decode("dec_b1_128", "128"),
    decode("dec_b1_1k", "1024"),
    decode("dec_b1_8k", "8192"),
    decode("dec_b1_64k", "65536"),
    decode("dec_b8_4k", "8x4096"),
    decode("dec_b64_4k", "64x4096"),
    decode("dec_b128_1k", "128x1024"),
    decode("dec_b256_512", "256x512"),
    decode("dec_logn64", "logn:64:2048:32768"),
    decode("dec_skew32", "skew:32:65536:256"),
    decode("dec_mha_b32_2k", "32x2048", kv_heads=32),
    decode("dec_g8_b64_8k", "64x8192", heads=64),
    decode("dec_b64_4k_fp8", "64x4096", kv_dtype="float8_e4m3"),
    prefill("spec_64x4@4k", "64x4", "64x4096"),
)
PREFILL = (
    prefill("pre_1x8k", "8192", "8192"),
    prefill("pre_4x4k", "4x4096", "4x4096"),
    prefill("pre_16x1k", "16x1024", "16x1024"),
    prefill("pre_8x512@8k", "8x512", "8x8192"),
    prefill("pre_1x16k", "16384", "16384"),
    prefill("pre_1x8k_p64", "8192", "8192", block_size=64),
    prefill("pre_1x8k_p128", "8192", "8192", block_size=128),
)
# Decode of other shapes than those above, each past 200 MB of keys and values, which no L2 cache holds.
SHAPES = (
    *(decode(f"dec_block{size}", "64x4096", block_size=size) for size in (8, 32, 64, 128, 256)),
    decode("dec_group1", "64x4096", heads=8),
    decode("dec_group2", "64x4096", heads=16),
    decode("dec_group5", "64x4096", heads=40),
    decode("dec_group7", "64x4096", heads=28, kv_heads=4),
    decode("dec_group16", "64x4096", heads=64, kv_heads=4),
    # One KV head a GPU, as tensor parallelism leaves it.
    decode("dec_group8_1kv", "256x4096", heads=8, kv_heads=1),
    decode("dec_group32_1kv", "256x4096", heads=32, kv_heads=1),
    decode("dec_group64_1kv", "256x4096", heads=64, kv_heads=1),
    *(decode(f"dec_d{dim}", "64x4096", head_dim=dim) for dim in (64, 80, 96, 112, 192, 256)),
    decode("dec_e5m2", "64x4096", kv_dtype="float8_e5m2"),
    decode("dec_fp16", "64x4096", dtype="float16", kv_dtype="float16"),
    decode("dec_window1k", "64x8192", window=1024),
    decode("dec_hnd", "64x4096", layout="HND"),
    prefill("spec_64x8@4k", "64x8", "64x4096"),
    prefill("spec_64x16@4k", "64x16", "64x4096"),
    decode("dec_logn128", "logn:128:1024:16384"),
    decode("dec_uniform64", "uniform:64:128:8192"),
)
# Prefill of other shapes than those above.
PREFILL_SHAPES = (
    *(prefill(f"pre_block{size}", "8192", "8192", block_size=size) for size in (8, 32, 256)),
    *(prefill(f"pre_d{dim}", "8192", "8192", head_dim=dim) for dim in (64, 80, 96, 112, 192, 256)),
    prefill("pre_group1", "8192", "8192", heads=32, kv_heads=32),
    prefill("pre_group5", "8192", "8192", heads=40),
    prefill("pre_group7", "8192", "8192", heads=28, kv_heads=4),
    prefill("pre_group16", "8192", "8192", heads=64, kv_heads=4),
    prefill("pre_fp16", "8192", "8192", dtype="float16", kv_dtype="float16"),
    prefill("pre_fp8", "8192", "8192", kv_dtype="float8_e4m3"),
    prefill("pre_window1k", "16384", "16384", window=1024),
    *(prefill(f"pre_1x{length}", str(length), str(length)) for length in (512, 1024, 2048)),
    prefill("pre_4x512", "4x512", "4x512"),
    *(prefill(f"pre_1x{n}@4k", str(n), str(4096 + n)) for n in (128, 512)),
    prefill("pre_1x128@8k", "128", "8192"),
    prefill("pre_1x128@32k", "128", "32768"),
    prefill("pre_64x256", "64x256", "64x256"),
    prefill("pre_mixed", "2x2048+62x1", "2x4096+62x4096"),
)
CPU_DECODE = (
    decode("cpu_dec_b1_1k", "1024"),
    decode("cpu_dec_b1_4k", "4096"),
    decode("cpu_dec_b1_16k", "16384"),
    decode("cpu_dec_b8_4k", "8x4096"),
    decode("cpu_dec_b8_16k", "8x16384"),
    decode("cpu_dec_b32_4k", "32x4096"),
    decode("cpu_dec_skew16", "skew:16:16384:64"),
    decode("cpu_dec_b1_1k_fp32", "1024", dtype="float32", kv_dtype="float32"),
    decode("cpu_dec_b8_4k_fp32", "8x4096", dtype="float32", kv_dtype="float32"),
    decode("cpu_dec_b8_8k_fp32", "8x8192", dtype="float32", kv_dtype="float32"),
    decode("cpu_dec_b8_4k_fp8", "8x4096", kv_dtype="float8_e4m3"),
)
CPU_PREFILL = (
    prefill("cpu_pre_512", "512", "512"),
    prefill("cpu_pre_2048", "2048", "2048"),
    prefill("cpu_pre_512_fp32", "512", "512", dtype="float32", kv_dtype="float32"),
    prefill("cpu_pre_2048_fp32", "2048", "2048", dtype="float32", kv_dtype="float32"),
    prefill("cpu_mixed", "128+8x1", "2048+8x512"),
)
# Minutes beside some peers.
CPU_LONG_PREFILL = (
    prefill("cpu_pre_8192", "8192", "8192"),
    prefill("cpu_pre_8192_fp32", "8192", "8192", dtype="float32", kv_dtype="float32"),
)
GROUPS = {
    "decode": DECODE,
    "prefill": PREFILL,
    "shapes": SHAPES,
    "prefill-shapes": PREFILL_SHAPES,
    "cpu-decode": CPU_DECODE,
    "cpu-prefill": CPU_PREFILL,
    "cpu-prefill-long": CPU_LONG_PREFILL,
}


def find_cases(names: list[str]) -> list[Case]:
    """Named cases and groups of them, in the order asked for."""
    known = {case.name: (case,) for group in GROUPS.values() for case in group} | GROUPS
    found: dict[str, Case] = {}
    for name in names:
        if name not in known:
            raise CaseError(f"--case must be one of {', '.join(known)}; got {name}")
        found |= {case.name: case for case in known[name]}
    return list(found.values())
