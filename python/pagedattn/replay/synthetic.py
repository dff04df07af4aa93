# SPDX-License-Identifier: Apache-2.0
"""A made-up trace with what real ones have: skewed lengths, shared system prompts and parallel samples."""

from __future__ import annotations

import numpy as np

from .traces import Request, content_stream, scaled, unique_stream

DEFAULT_REQUESTS = 256

# Prompt and output lengths of chat traffic are close to lognormal: (median, sigma of the logarithm, largest).
_PROMPT = (160, 0.9, 4096)
_OUTPUT = (56, 0.7, 1024)

# Half the requests follow one of a few system prompts; the first is the most popular.
_SYSTEM_PROMPTS = (192, 96, 320)
_SYSTEM_SHARE = (0.30, 0.15, 0.05)

# One request in eight asks for several samples of one prompt.
_SAMPLES_SHARE = 0.125
_MOST_SAMPLES = 4


def synthetic_trace(requests: int = DEFAULT_REQUESTS, *, length_scale: float = 1.0, seed: int = 0) -> list[Request]:
    """Make a trace; the same arguments give the same trace.

    Parameters
    ----------
    requests : int
        How many requests.
    length_scale : float
        Every length is multiplied by this, down to 1 token.
    seed : int
        Chooses lengths and tokens.
    """
    rng = np.random.default_rng(seed)
    prompts = _lognormal(rng, requests, *_PROMPT)
    outputs = _lognormal(rng, requests, *_OUTPUT)
    systems = rng.choice(len(_SYSTEM_PROMPTS) + 1, size=requests, p=[*_SYSTEM_SHARE, 1 - sum(_SYSTEM_SHARE)])
    forks = rng.random(requests) < _SAMPLES_SHARE
    samples = np.where(forks, rng.integers(2, _MOST_SAMPLES + 1, requests), 1)
    trace = []
    for index in range(requests):
        segments = [(unique_stream(seed, index), scaled(int(prompts[index]), length_scale))]
        system = int(systems[index])
        if system < len(_SYSTEM_PROMPTS):
            stream = content_stream(system, domain=seed + 1)
            segments.insert(0, (stream, scaled(_SYSTEM_PROMPTS[system], length_scale)))
        trace.append(
            Request(
                index,
                np.array([stream for stream, _ in segments], np.uint64),
                np.array([length for _, length in segments], np.int64),
                scaled(int(outputs[index]), length_scale),
                int(samples[index]),
            )
        )
    return trace


def _lognormal(rng: np.random.Generator, count: int, median: float, sigma: float, largest: int) -> np.ndarray:
    return np.clip(np.rint(rng.lognormal(np.log(median), sigma, count)), 1, largest).astype(np.int64)
