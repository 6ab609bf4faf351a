"""`tiny` in one bare process of one thread, one site after the other: the seconds of each round but the first, as JSON.

Takes the loop, "plain" or "tuned", and the rounds.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from tiny import SITES, SITES_PER_ROUND, first_model, fit, fit_tuned, load_all


def main(loop: str, rounds: int) -> list[float]:
    train = {"plain": fit, "tuned": fit_tuned}[loop]
    torch.set_num_threads(1)
    load_all()
    params, seconds = first_model().state_dict(), []
    for round in range(rounds):
        began = time.perf_counter()
        total = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
        seen, losses = 0, 0.0
        for rank in sorted(np.random.default_rng(round).choice(SITES, SITES_PER_ROUND, replace=False).tolist()):
            new, loss, examples = train(params, rank)
            for name, tensor in new.items():
                total[name].add_(tensor, alpha=examples)
            seen, losses = seen + examples, losses + loss * examples
        params = {name: tensor / seen for name, tensor in total.items()}
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]) + 1)))
