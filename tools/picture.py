"""Draw the README's picture: `uv run python tools/picture.py` writes nbs/images/first.png.

Left: a drawn scene, three of its eight maps by the networks of the demo pack, each with the OA that the shipped
assessor predicts, the true OA and the wrong pixels. Right: all maps of real tiles, from the committed tables."""
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from rssqa.core import bundled
from rssqa.data.synthetic import PALETTE, scene
from rssqa.quality.pack import Pack
from rssqa.tables.store import read_published
from rssqa.viz.figures import case_oa, case_panels, set_style

ROOT = Path(__file__).resolve().parents[1]
SEED = 90_000          # of a scene that the networks did not learn from
MODEL = 'level-pooled ensemble'
SMALL = dict(fontsize=9, weight='normal')


def assessed_scene(seed): # image, truth, {method: mask}, table of the answer
    drawn = scene('town', seed=seed, size=96)
    pack = Pack(bundled('demo'), 'cpu')
    dataset = pack.resolve_dataset()
    answer = pack.assess_networks(drawn.image, pack.networks(dataset), dataset, pack.usual(dataset))
    return drawn, {m.name: m.ids for m in answer.maps}, answer.table


def draw_scene(axes, drawn, masks, table): # axes (2,4)
    shown = table.iloc[[0, len(table) // 2, -1]]                     # highest, middle and lowest prediction
    for ax in axes.flat: ax.set(xticks=[], yticks=[], frame_on=False)
    for column, row in enumerate(shown.itertuples()):
        mask = masks[row.name]
        panels = case_panels(drawn.image, mask, PALETTE, drawn.mask)
        axes[0, column + 1].imshow(panels['map'])
        bounds = f'90 %: {row.lower:.2f} to {row.upper:.2f}'
        text = f'{row.name}\npredicted OA {row.predicted:.2f}\n{bounds}'
        axes[0, column + 1].set_title(text, **SMALL)
        axes[1, column + 1].imshow(panels['error'])
        axes[1, column + 1].set_xlabel(f'true OA {case_oa(drawn.mask, mask):.2f}', **SMALL)
    axes[0, 0].imshow(panels['image'])
    axes[0, 0].set_title('image\n\n', **SMALL)
    axes[1, 0].imshow(panels['truth'])
    axes[1, 0].set_xlabel('truth: only to check', **SMALL)
    axes[1, 1].set_ylabel('wrong pixels', **SMALL)


def real_tiles(): # predicted and true OA of every map
    truth = pd.read_parquet(ROOT/'data/tables/open.parquet', columns=['image_id', 'dataset', 'method', 'oa'])
    columns = ['image_id', 'method', 'seed', MODEL]
    predicted = read_published(ROOT/'data/tables/predictions_main.parquet', columns=columns)
    return predicted[predicted.seed == 0].merge(truth, on=['image_id', 'method'])


def draw_real_tiles(ax, rows):
    counts = dict(gridsize=30, extent=(0, 1, 0, 1), mincnt=1, bins='log', cmap='Blues', linewidths=0)
    ax.hexbin(rows[MODEL], rows.oa, **counts)
    ax.plot([0, 1], [0, 1], color='#333333', lw=0.8)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect='equal', xlabel='OA predicted without labels', ylabel='true OA')
    ax.set_title(f'{len(rows):,} maps of {rows.image_id.nunique():,} real tiles', **SMALL)


def main():
    set_style()
    fig = Figure((9.6, 3.7), layout='constrained')
    left, right = fig.subfigures(1, 2, width_ratios=[1.75, 1])
    draw_scene(left.subplots(2, 4), *assessed_scene(SEED))
    draw_real_tiles(right.subplots(), real_tiles())
    path = ROOT/'nbs/images/first.png'
    fig.savefig(path, dpi=100)
    Image.open(path).convert('RGB').quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == '__main__': main()
