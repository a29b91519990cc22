"""How long work takes beside processes that compute: a language model, and logistic regression.

`python -m crl_benchmarks.busy_machine` times both with one thread and with two, in alternating
rounds, beside 0, 1 and 2 busy processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np

from crl_benchmarks.markdown import table
from crl_sdk.basis._generate import generate_texts
from crl_sdk.basis._generation_options import GenerationOptions
from crl_sdk.basis._language_model import LanguageModel

BUSY = (0, 1, 2)
THREADS = (1, 2)
_OPTIONS = GenerationOptions(max_answers=4, patience=4, accept_unsure=True)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run processes that do nothing but compute."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def ask(llm: LanguageModel) -> Callable[[], object]:
    """Return a function that asks a model for four answers."""
    return lambda: generate_texts("color", llm, _OPTIONS)


def classify(threads: int) -> Callable[[], object]:
    """Return a function that fits a logistic regression to 100 rows of ten classes."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    rows, codes = rng.standard_normal((100, 128)).astype(np.float32), np.arange(100) % 10
    model = LogisticRegression(max_iter=1000)

    def fit() -> None:
        with threadpool_limits(1) if threads == 1 else nullcontext():
            model.fit(rows, codes)

    return fit


def measure(rounds: int) -> list[list[str]]:
    """Return the rows of the table: seconds for each number of busy processes."""
    with ExitStack() as stack:
        works: dict[tuple[str, int], Callable[[], object]] = {}
        for threads in THREADS:
            llm = stack.enter_context(LanguageModel.open(threads=threads))
            works["language model, 4 answers", threads] = ask(llm)
            works["logistic regression, 100 rows", threads] = classify(threads)
        seconds: dict[tuple[str, int], list[str]] = {key: [] for key in works}
        for busy in BUSY:
            taken: dict[tuple[str, int], list[float]] = {key: [] for key in works}
            with busy_processes(busy):
                for _ in range(rounds):
                    for key, work in works.items():
                        started = time.perf_counter()
                        work()
                        taken[key].append(time.perf_counter() - started)
            for key, each in taken.items():
                seconds[key].append(f"{statistics.median(each):.2f} s")
    return [[what, str(threads), *cells] for (what, threads), cells in sorted(seconds.items())]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rows = measure(parser.parse_args().rounds)
    print(table(["work", "threads", *(f"{busy} busy" for busy in BUSY)], rows))


if __name__ == "__main__":
    main()
