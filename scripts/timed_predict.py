"""`chestct predict`, or without arguments `import monai`, with clocks; for benchmark.py the last line it prints is JSON."""

import json
import resource
import sys
import time
from functools import wraps

START = time.perf_counter()


def clocks() -> tuple[float, float]:
    """Seconds since the start: of the wall clock, and of the processor in all threads."""
    return time.perf_counter() - START, time.process_time()


def time_import() -> dict:
    import monai  # noqa: F401

    return {"monai": clocks()}


def measure(arguments: list[str]) -> dict:
    """Predict, and return clocks at the marks, seconds of the thread that calls the network in it, and peak memory in MB."""
    from bundle import cli

    cli.import_monai()
    import bundle.inference
    from bundle.networks import MultiTaskNet

    marks, network, forward = {"imports": clocks()}, 0.0, MultiTaskNet.forward

    @wraps(forward)
    def timed(*args, **kwargs):
        nonlocal network
        marks.setdefault("first slice", clocks())
        begin = time.thread_time()  # a clock on the wall would count the threads beside it
        try:
            return forward(*args, **kwargs)
        finally:
            network += time.thread_time() - begin

    MultiTaskNet.forward = timed
    cli.main(["predict", *arguments])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**marks, "end": clocks(), "network": network, "memory": peak / (1024 if sys.platform == "linux" else 2**20)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:]) if sys.argv[1:] else time_import()))
