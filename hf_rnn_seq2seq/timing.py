"""What is faster on the machine at hand, where no name or flag of a processor says so."""

import math
import time
from collections.abc import Callable

REPEATS = 15


def fastest_seconds(*contestants: Callable[[], object]) -> list[float]:
    """Of each its shortest time, which other work on the machine disturbs least. They take turns."""
    fastest = [math.inf for _ in contestants]
    for repeat in range(REPEATS + 1):
        for index, contestant in enumerate(contestants):
            start = time.perf_counter()
            contestant()
            if repeat:  # the first time warms up
                fastest[index] = min(fastest[index], time.perf_counter() - start)
    return fastest
