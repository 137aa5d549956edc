"""Compare ways to score one 512x512 mask: `uv run python tools/bench_scoring.py`. Ratios of one run carry
over to other machines; milliseconds do not."""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')

import importlib.util, time

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix

from rssqa.segment.metrics import IGNORE, accuracy, confusion

SIDE, CLASSES, ROUNDS = 512, 7, 8


def masks(seed: int = 0) -> tuple:
    "Make a truth with 5 % ignored pixels and a prediction that is right on about 80 %."
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, CLASSES, (2, SIDE, SIDE), np.uint8)
    guess = np.where(rng.random(truth.shape) < 0.77, truth, guess)
    truth[rng.random(truth.shape) < 0.05] = IGNORE
    return truth, guess


def ways(truth, guess) -> dict: # name -> function without arguments
    "List the ways; torchmetrics joins where it is installed."
    valid = truth != IGNORE
    found = {
        'sklearn confusion_matrix': lambda: confusion_matrix(
            truth[valid], guess[valid], labels=range(CLASSES)
        ),
        'rssqa confusion': lambda: confusion(truth, guess, CLASSES),
        'rssqa confusion, int64 masks': lambda t=truth.astype(np.int64), g=guess.astype(np.int64): confusion(
            t, g, CLASSES
        ),
        'rssqa confusion + accuracy': lambda: accuracy(confusion(truth, guess, CLASSES)),
        'sklearn accuracy_score (OA only)': lambda: accuracy_score(truth[valid], guess[valid]),
    }
    return found | (torchmetrics_ways(truth, guess) if importlib.util.find_spec('torchmetrics') else {})


def torchmetrics_ways(truth, guess) -> dict:
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix
    t, g = (torch.as_tensor(m.astype(np.int64))[None] for m in (truth, guess))
    about = dict(num_classes=CLASSES, ignore_index=IGNORE)
    return {
        'torchmetrics accuracy, samplewise': lambda: multiclass_accuracy(
            g, t, average='micro', multidim_average='samplewise', **about
        ),
        'torchmetrics confusion_matrix': lambda: multiclass_confusion_matrix(g, t, **about),
    }


def milliseconds(work, times: int = 3) -> float:
    "Time a function back to back; the first call warms caches, so the best counts."
    def once():
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    return min(once() for _ in range(times))


def main():
    truth, guess = masks()
    todo = ways(truth, guess)
    assert np.array_equal(todo['rssqa confusion'](), todo['sklearn confusion_matrix']())
    # turn by turn, so a busy moment hits all
    laps = [{name: milliseconds(work) for name, work in todo.items()} for _ in range(ROUNDS)]
    best = {name: min(lap[name] for lap in laps) for name in todo}
    base = best['sklearn confusion_matrix']
    print(f'one {SIDE}x{SIDE} mask, {CLASSES} classes, best of {ROUNDS} rounds')
    for name, ms in sorted(best.items(), key=lambda item: item[1]):
        print(f'{name:36} {ms:8.3f} ms {base / ms:7.1f} x')


if __name__ == '__main__': main()
