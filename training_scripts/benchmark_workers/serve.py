"""The worker's side of benchmark.py: a process that waits for jobs, so that toolkits can take turns on one machine.

Needs torch alone, for it runs in the environments of other toolkits, too.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

Batch = dict[str, list[list[int]]]  # "source" and "target": a list of ids from 4 on for each row, without special ids


def serve(jobs: dict[str, Callable[..., Any]]) -> None:
    """Answers each line {"job": name, ...arguments} of standard input with a line of JSON on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a toolkit prints is not an answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"result": jobs[arguments.pop("job")](**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def timed_updates(update: Callable[[Batch], None], batches: list[Batch], precision: str) -> float:
    """Seconds that the updates take, one a batch, with float32 matrix products of this precision."""
    torch.set_float32_matmul_precision(precision)
    start = time.perf_counter()
    for batch in batches:
        update(batch)
    return time.perf_counter() - start


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
