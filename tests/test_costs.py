"""Accuracy against processor time: answers in any order of methods, and the committed curve."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rssqa.bench.costs import ORDERS, USUAL, answer_name, fuse_in_order
from rssqa.data.datasets import IGNORE
from rssqa.tables.grid import PredictionGrid

ROOT = Path(__file__).resolve().parents[1]
METHODS = list('abcde')


def drawn(seed, classes=4, side=9):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), (len(METHODS), side, side)).transpose(0, 3, 1, 2)
    p = (255 * p).round().astype(np.uint8)
    truth = rng.integers(classes, size=(side, side)).astype(np.uint8)
    truth[rng.random((side, side)) < 0.2] = IGNORE
    return PredictionGrid('i', 'town', METHODS, p, p, p.argmax(1).astype(np.uint8), truth)


@pytest.mark.parametrize('seed', range(5))
def test_each_answer_by_a_plain_loop(seed):
    grid = drawn(seed)
    order = list(np.random.default_rng(seed).permutation(METHODS))
    labelled = grid.truth != IGNORE
    for m, oa in enumerate(fuse_in_order(grid, order), 1):
        mean = sum(grid.probabilities[METHODS.index(name)] for name in order[:m]) / m
        assert np.isclose(oa, (mean.argmax(0) == grid.truth)[labelled].mean())


def test_all_methods_give_one_answer_in_any_order():
    grid = drawn(0)
    last = {fuse_in_order(grid, list(order))[-1] for order in (METHODS, METHODS[::-1], 'cadbe')}
    assert max(last) - min(last) < 1e-12


def test_the_committed_curve():
    table = pd.read_csv(ROOT/'data/results/costs.csv')
    for (_, _), part in table.groupby(['dataset', 'counted']):
        part = part.set_index('answer')
        last = []
        for order in ORDERS:
            line = part.loc[[answer_name(order, m) for m in range(1, 9)]]
            assert line.seconds.is_monotonic_increasing
            last.append(line.oa.iloc[-1])
        assert np.ptp(last) < 1e-3, 'eight methods are the same eight in any order'
        assert part.difference[USUAL] == 0
        assert (part.low <= part.difference).all() and (part.difference <= part.high).all()
        assert part.oa['best'] == part.oa.max()
        assert np.isclose(part.seconds['recommended'], part.seconds[answer_name('usual', 8)])
