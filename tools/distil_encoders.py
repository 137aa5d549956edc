"""Make the encoders that come with rssqa: `distil_encoders.py swin48 mit32`, with RSSQA_REAL set. Resumable."""
import argparse
from pathlib import Path

import pandas as pd

from rssqa.core import progress, real_dir
from rssqa.segment.methods.distil import STUDENTS, DistilRecipe, distil

ROOT = Path(__file__).parent.parent
SOURCES = ('ucm', 'eurosat') # images in the public domain (USGS) and under MIT (Copernicus Sentinel-2)


def image_files(pairs: Path) -> list[Path]:
    "List the training images of SOURCES."
    rows = pd.read_csv(pairs/'pairs.csv')
    chosen = rows[rows.source.isin(SOURCES) & (rows.split == 'train')]
    return [pairs/path for path in sorted(chosen.filepath.unique())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', default=list(STUDENTS))
    parser.add_argument('--steps', type=int, default=DistilRecipe.steps)
    parser.add_argument('--out', type=Path, default=ROOT/'data/models/encoders')
    args = parser.parse_args()
    real = real_dir()
    images = image_files(real/'pairs')
    teacher = real/'weights/mobilenetv2_100_imagenet.safetensors'
    recipe = DistilRecipe(args.steps)
    for name in args.names:
        with progress(None, f'distilling {name}', recipe.steps, 'step') as bar:
            losses = []
            def tick(step, values):
                bar.update(step - bar.n)
                losses.append(values)
            path = distil(name, teacher, images, args.out, recipe, tick=tick)
        print(f'{path}: {path.stat().st_size / 2**20:.1f} MB, losses of the last steps',
              pd.DataFrame(losses[-100:]).mean().round(3).tolist())


if __name__ == '__main__': main()
