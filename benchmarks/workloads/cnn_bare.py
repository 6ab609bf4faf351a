"""`device` in two bare processes of one thread each: the seconds of each round but the first, as JSON. Takes the number of rounds.

Each process trains half of a round's sites and sums their weighted parameters in shared memory; this one adds the two sums, and the next
round begins.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time

import numpy as np
import torch
from cnn import IMAGES, SITES, SITES_PER_ROUND, first_model, fit

PROCESSES = 2


def shared(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of these names and shapes in memory that forked processes share."""
    memory, at, made = mmap.mmap(-1, 4 * sum(tensor.numel() for tensor in like.values())), 0, {}
    for name, tensor in like.items():
        made[name] = torch.frombuffer(memory, dtype=torch.float32, count=tensor.numel(), offset=at).view(tensor.shape)
        at += 4 * tensor.numel()
    return made


def drawn(round: int) -> list[int]:
    return sorted(np.random.default_rng(round).choice(SITES, SITES_PER_ROUND, replace=False).tolist())


def train(part: int, params: dict[str, torch.Tensor], total: dict[str, torch.Tensor], rounds: int, go: int, done: int) -> None:
    """One process: its part of each round's sites."""
    torch.set_num_threads(1)
    size = SITES_PER_ROUND // PROCESSES
    for round in range(rounds):
        os.read(go, 1)
        for tensor in total.values():
            tensor.zero_()
        for rank in drawn(round)[part * size : (part + 1) * size]:
            for name, tensor in fit(params, rank)[0].items():
                total[name].add_(tensor, alpha=IMAGES)
        os.write(done, b".")


def main(rounds: int) -> list[float]:
    first = first_model().state_dict()
    params, totals = shared(first), [shared(first) for _ in range(PROCESSES)]
    for name, tensor in first.items():
        params[name].copy_(tensor)
    pipes = []
    for part, total in enumerate(totals):
        (go, start), (end, done) = os.pipe(), os.pipe()
        if os.fork() == 0:
            train(part, params, total, rounds, go, done)
            os._exit(0)
        pipes.append((start, end))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for start, _ in pipes:
            os.write(start, b".")
        for _, end in pipes:
            os.read(end, 1)
        for name, tensor in params.items():
            torch.add(*(total[name] for total in totals), out=tensor).div_(IMAGES * SITES_PER_ROUND)
        seconds.append(time.perf_counter() - began)
    for _ in range(PROCESSES):
        os.wait()
    return seconds[1:]


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]) + 1)))
