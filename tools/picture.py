"""Draw the README's picture from committed tables: `uv run python tools/picture.py` writes nbs/images/first.png."""
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from rssqa.tables.store import read_published
from rssqa.viz.figures import PALETTE, set_style

ROOT = Path(__file__).resolve().parents[1]


def main():
    set_style()
    truth = pd.read_parquet(ROOT/'data/tables/open.parquet', columns=['image_id', 'dataset', 'method', 'oa'])
    told = (
        read_published(
            ROOT / 'data/tables/predictions_main.parquet',
            columns=['image_id', 'method', 'seed', 'level-pooled ensemble'],
        )
        .query('seed == 0')
        .merge(truth, on=['image_id', 'method'])
    )
    board = pd.read_csv(ROOT/'data/results/paper_main.csv').set_index('predictor')
    names = [
        'level-pooled ensemble',
        'consensus model',
        'RS-SQA',
        'ridge: dispersion and agreement',
        'trees: everything',
        'mean of dataset and method',
    ]
    fig = Figure((9.2, 3.5), layout='constrained')
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.25])
    left.hexbin(
        told['level-pooled ensemble'],
        told.oa,
        gridsize=34,
        extent=(0, 1, 0, 1),
        mincnt=1,
        bins='log',
        cmap='Blues',
        linewidths=0,
    )
    left.plot([0, 1], [0, 1], color='#333333', lw=0.8)
    left.set(
        xlim=(0, 1),
        ylim=(0, 1),
        aspect='equal',
        xlabel='accuracy predicted without labels',
        ylabel='true accuracy',
        title=f'{len(told):,} maps of {told.image_id.nunique():,} real tiles',
    )
    values = board.srocc_image[names]
    right.barh(
        range(len(names))[::-1],
        values,
        color=[PALETTE[0] if n in names[:3] else '#AAAAAA' for n in names],
        height=0.65,
    )
    for y, v in zip(range(len(names))[::-1], values): right.text(v + 0.008, y, f'{v:.2f}', va='center')
    right.set_yticks(range(len(names))[::-1], names)
    right.set(
        xlim=(0, 0.7),
        xlabel='rank correlation inside an image (scenes never seen)',
        title='which of the eight maps is best?',
    )
    (ROOT/'nbs/images').mkdir(exist_ok=True)
    fig.savefig(path := ROOT/'nbs/images/first.png', dpi=90)
    Image.open(path).convert('RGB').quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == '__main__': main()
