# SPDX-License-Identifier: Apache-2.0
"""Request traces: what was asked of a server, read from the files in which such records are published.

Two formats are known.  *Mooncake* JSON lines carry ``input_length``, ``output_length`` and ``hash_ids``, one id for
each 512 tokens of the prompt, where equal ids stand for equal content (Qin et al., FAST'25).  *Azure* CSV carries
``ContextTokens`` and ``GeneratedTokens`` and says nothing of content (Patel et al., ISCA'24).  Neither holds the text,
so the tokens are made here: a prompt is a row of segments, each the start of a named stream of tokens, and two
requests share a prefix exactly where they share their first segments.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .hashing import GOLDEN, key, mix

MOONCAKE_BLOCK = 512
"""Prompt tokens that one Mooncake hash id stands for."""

MAX_LENGTH = 10_000_000
"""A longer prompt or output in a trace is taken for a damaged file."""

VOCABULARY_BITS = 17
"""Tokens are below 2**17 = 131072, the size of a large model's vocabulary."""

# First parts of stream keys, so that ids of different kinds never name the same stream.
_CONTENT, _UNIQUE, _SAMPLED = 1, 2, 3


class TraceError(ValueError):
    """A trace cannot be read.  The message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    Attributes
    ----------
    index : int
        Its place in the trace, from 0.
    streams, lengths : ndarray
        The prompt's segments: the first ``lengths[i]`` tokens of the stream ``streams[i]`` (uint64 keys, int64).
    output_length : int
        Tokens to generate for each sample, at least 1.
    samples : int
        Parallel samples drawn from the one prompt.
    """

    index: int
    streams: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    output_length: int
    samples: int = 1

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return int(self.lengths.sum())

    @property
    def final_length(self) -> int:
        """Tokens of a sample when it is finished, the prompt included."""
        return self.prompt_length + self.output_length

    def prompt(self) -> NDArray[np.int32]:
        """The prompt's tokens."""
        starts = np.cumsum(self.lengths) - self.lengths
        offsets = np.arange(self.prompt_length) - np.repeat(starts, self.lengths)
        return _tokens(np.repeat(self.streams, self.lengths), offsets)

    def sampled(self, sample: int, seed: int) -> NDArray[np.int32]:
        """The tokens that sample number `sample` will draw: its own stream, known in advance."""
        stream = np.full(self.output_length, key(_SAMPLED, seed, self.index, sample), np.uint64)
        return _tokens(stream, np.arange(self.output_length))


def _tokens(streams: NDArray[np.uint64], offsets: NDArray[Any]) -> NDArray[np.int32]:
    words: NDArray[np.uint64] = mix(streams + offsets.astype(np.uint64) * GOLDEN)
    return (words >> np.uint64(64 - VOCABULARY_BITS)).astype(np.int32)


def content_stream(identity: int, *, domain: int = 0) -> int:
    """Key of a stream that several prompts may share."""
    return key(_CONTENT, domain, identity)


def unique_stream(seed: int, index: int) -> int:
    """Key of a stream that belongs to one request."""
    return key(_UNIQUE, seed, index)


def read_trace(
    path: str | Path, *, requests: int | None = None, length_scale: float = 1.0, seed: int = 0
) -> list[Request]:
    """Read the first `requests` requests of a trace file (all of them for None).

    The file is read line by line and no further than it has to be.

    Parameters
    ----------
    path : str or Path
        A Mooncake JSON-lines or an Azure CSV file; the content decides which, then the name's ending.
    requests : int, optional
        How many requests to read at most.
    length_scale : float
        Every length is multiplied by this, down to 1 token.  The 512 tokens of a Mooncake id scale too (rounded up),
        so shared prefixes stay shared.
    seed : int
        Chooses the tokens of prompts whose content the trace does not tell.

    Raises
    ------
    TraceError
        If the file cannot be read, is in neither format, or a line is malformed.
    """
    if not (math.isfinite(length_scale) and length_scale > 0):
        raise ValueError(f"read_trace: `length_scale` must be a positive number; got {length_scale}")
    path = Path(path)
    try:
        kind = _detect(path)
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if kind == "mooncake":
                found = _mooncake(path, lines, length_scale)
            else:
                found = _azure(path, lines, length_scale, seed)
            trace = list(islice(found, requests))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    if not trace:
        raise TraceError(f"{path}: holds no requests")
    return trace


def scaled(length: int, scale: float) -> int:
    """`length` times `scale`, rounded, and at least 1; a TraceError above MAX_LENGTH."""
    product = length * scale
    if not product <= MAX_LENGTH:
        raise TraceError(f"a length of {length} tokens times {scale:g} is more than {MAX_LENGTH}")
    return max(1, round(product))


def _detect(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as lines:
        # A bound on the look-ahead: a huge file of another kind may hold no line break at all.
        first = next((line for line in iter(lambda: lines.readline(65536), "") if line.strip()), "").strip()
    if not first:
        raise TraceError(f"{path}: holds no requests")
    if first.startswith("{"):
        return "mooncake"
    if "ContextTokens" in first or "GeneratedTokens" in first:
        return "azure"
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson", ".json"):
        return "mooncake"
    if ending == ".csv":
        return "azure"
    raise TraceError(
        f"{path}: neither a Mooncake trace (JSON lines with input_length, output_length, hash_ids) "
        "nor an Azure trace (CSV with ContextTokens, GeneratedTokens)"
    )


def _mooncake(path: Path, lines: Iterator[str], scale: float) -> Iterator[Request]:
    # Rounded up: n ids then always cover a scaled prompt of at most 512 n tokens.
    segment = math.ceil(MOONCAKE_BLOCK * scale)
    index = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _json_object(path, number, line)
        inputs = _length(path, number, "input_length", record.get("input_length"), least=1)
        outputs = _length(path, number, "output_length", record.get("output_length"), least=0)
        ids = _hash_ids(path, number, record.get("hash_ids"), inputs)
        prompt = scaled(inputs, scale)
        count = math.ceil(prompt / segment)
        lengths = np.full(count, segment, np.int64)
        lengths[-1] = prompt - segment * (count - 1)
        streams = np.array([content_stream(identity) for identity in ids[:count]], np.uint64)
        yield Request(index, streams, lengths, scaled(outputs, scale))
        index += 1


def _azure(path: Path, lines: Iterator[str], scale: float, seed: int) -> Iterator[Request]:
    rows = csv.reader(lines)
    columns: list[str] = []
    index = 0
    try:
        for row in rows:
            if not any(field.strip() for field in row):
                continue
            if not columns:
                columns = _azure_columns(path, rows.line_num, row)
                continue
            if len(row) != len(columns):
                raise TraceError(f"{path}, line {rows.line_num}: expected {len(columns)} fields; got {len(row)}")
            fields = dict(zip(columns, (field.strip() for field in row), strict=True))
            inputs = _length(path, rows.line_num, "ContextTokens", _whole(fields["ContextTokens"]), least=1)
            outputs = _length(path, rows.line_num, "GeneratedTokens", _whole(fields["GeneratedTokens"]), least=0)
            streams = np.array([unique_stream(seed, index)], np.uint64)
            yield Request(index, streams, np.array([scaled(inputs, scale)]), scaled(outputs, scale))
            index += 1
    except csv.Error as error:
        raise TraceError(f"{path}, line {rows.line_num}: not CSV: {error}") from error


def _azure_columns(path: Path, number: int, row: list[str]) -> list[str]:
    columns = [name.strip() for name in row]
    for name in ("ContextTokens", "GeneratedTokens"):
        if name not in columns:
            raise TraceError(f"{path}, line {number}: the header has no column {name}; got {', '.join(columns)}")
    return columns


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise TraceError(f"{path}, line {number}: expected a JSON object; got {_shown(record)}")
    return record


def _hash_ids(path: Path, number: int, ids: Any, inputs: int) -> list[int]:
    if ids is None:
        raise TraceError(f"{path}, line {number}: hash_ids is missing")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**63 for i in ids):
        raise TraceError(
            f"{path}, line {number}: hash_ids must be a list of whole numbers from 0 to 2**63 - 1; got {_shown(ids)}"
        )
    expected = math.ceil(inputs / MOONCAKE_BLOCK)
    if len(ids) != expected:
        raise TraceError(
            f"{path}, line {number}: hash_ids must hold {expected} ids, one for each {MOONCAKE_BLOCK} of the "
            f"{inputs} tokens of input_length; got {len(ids)}"
        )
    return ids


def _length(path: Path, number: int, name: str, value: Any, *, least: int) -> int:
    if value is None:
        raise TraceError(f"{path}, line {number}: {name} is missing")
    # bool is a kind of int in Python, and `true` is not a length.
    if type(value) is not int or not least <= value <= MAX_LENGTH:
        raise TraceError(
            f"{path}, line {number}: {name} must be a whole number from {least} to {MAX_LENGTH}; got {_shown(value)}"
        )
    return value


def _whole(text: str) -> int | str | None:
    if not text:
        return None
    # Python's own reading also takes 1_0 for 10, and the digits of other scripts.
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        return text
    try:
        return int(text)
    except ValueError:  # of thousands of digits
        return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
