"""Draw which package imports which, nbs/images/packages.png: `uv run python tools/layers.py [--check]`.

A package is a folder of rssqa/ or a module beside those. The number of an arrow counts pairs of modules of
which one imports the other, inside a function or not. `--check` lists them and fails if one leads up."""
import argparse, ast, sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GROUND = ('core', 'provenance', 'exercises', 'systems')
LAYERS = (
    'data', 'testing', 'segment', 'domains', 'clip', 'tables', 'open_vocabulary', 'semi', 'referring', 'quality',
    'viz', 'scene', 'bench')
TOP = ('all', 'build_demo', 'demo', 'cli')
ORDER = GROUND + LAYERS + TOP           # lowest first; each may import only what stands before it
COLOURS = ('#8C6D31 #6B4C9A #C78500 #3F6B8C #009E73 #0072B2 #7A5230 #D04A00 #2E8B8B #CC5A9B #5B8A00 #9A4F6B '
           '#444444').split()
COLOUR_OF = dict(zip(LAYERS, COLOURS))  # of a package and of its arrows
GREY = '#808080'
UNIT = 0.82                             # inches, the width of a package with its gap
BOX = (0.92, 0.46)                      # in units
CAPTION = ('An arrow leads from a package to one that it imports; its number counts pairs of modules.\n'
           'Below, in grey: what rests on {}. Not drawn: those of the last column, to most packages.')


def module_files(folder: Path) -> dict:
    "Map the dotted name of each module of a package to its file."
    files = {}
    for path in sorted(folder.rglob('*.py')):
        name = '.'.join(path.relative_to(folder.parent).with_suffix('').parts)
        files[name.removesuffix('.__init__')] = path
    return files


def imported_names(node, package: list) -> list:
    "List the dotted names a statement imports, as seen from a package."
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[:len(package) - node.level + 1] if node.level else []
    base = '.'.join(base + [node.module or '']).strip('.')
    return [f'{base}.{alias.name}' for alias in node.names]


def imported_modules(name: str, files: dict) -> set:
    "List the modules of the same package that a module imports."
    package = name.split('.')
    if files[name].name != '__init__.py':
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(files[name].read_text(encoding='utf-8'))):
        for target in imported_names(node, package):
            found.add(target if target in files else target.rpartition('.')[0])  # a module, or part of one
    return found & set(files)


def package_of(module: str) -> str:
    "Give the first-level package of a module; nothing for the root and for the index."
    package = (module + '.').split('.')[1]
    return '' if package == '_modidx' else package


def find_arrows(folder: Path) -> dict:
    "Collect the pairs of modules behind each arrow: (from, to) -> pairs."
    files = module_files(folder)
    arrows = defaultdict(list)
    for module in files:
        for target in sorted(imported_modules(module, files)):
            ends = (package_of(module), package_of(target))
            if all(ends) and ends[0] != ends[1]:
                arrows[ends].append((module, target))
    return dict(arrows)


def check(arrows: dict) -> list:
    "Print all arrows as a table; list the imports that lead upwards and the packages without a place."
    rank = {package: place for place, package in enumerate(ORDER)}
    faults = []
    print('| from | to | pairs | example |')
    print('| --- | --- | ---: | --- |')
    for user, used in sorted(arrows, key=lambda ends: [rank.get(package, len(rank)) for package in ends]):
        pairs = arrows[user, used]
        print(f'| {user} | {used} | {len(pairs)} | {pairs[0][0]} imports {pairs[0][1]} |')
        if user not in rank or used not in rank:
            faults.append(f'{user} or {used} has no place in ORDER')
        elif rank[user] < rank[used]:
            faults += [f'{module} imports {target}, which stands higher' for module, target in pairs]
    return faults


def ports(ends: list, places: dict) -> dict:
    "Spread arrows along each box, so that those of one box do not cross: (arrow, package) -> x."
    spots = {}
    for package, place in places.items():
        lows = sorted((e for e in ends if e[0] == package), key=lambda e: place - places[e[1]])
        highs = sorted((e for e in ends if e[1] == package), key=lambda e: place - places[e[0]])
        here = lows + highs             # short arrows to the left, long ones, then those from the right
        offsets = np.linspace(-BOX[0]/2, BOX[0]/2, len(here) + 2)[1:-1]
        spots |= {(arrow, package): place + offset for arrow, offset in zip(here, offsets)}
    return spots


def arches(ends: list, places: dict, side: int) -> dict:
    "Give each arrow its four control points, above (1) or below (-1) the row."
    spots = ports(ends, places)
    steep = 0.33 if side > 0 else 0.19
    curves = {}
    for arrow in ends:
        start = spots[arrow, arrow[0]]
        stop = spots[arrow, arrow[1]]
        edge = side * BOX[1]/2
        peak = edge + side * (0.15 + steep * abs(start - stop)) * 4/3
        curves[arrow] = np.array([(start, edge), (start, peak), (stop, peak), (stop, edge)])
    return curves


def points_on(curve, times):
    "Compute points of a cubic curve."
    t = np.asarray(times)[:, None]
    return (1-t)**3 * curve[0] + 3*t*(1-t)**2 * curve[1] + 3*t**2*(1-t) * curve[2] + t**3 * curve[3]


def label_spots(curves: dict) -> dict:
    "Choose for each arrow a point near its top that is far from the other arrows and labels."
    times = np.linspace(0.25, 0.75, 41)
    spots = {}
    for arrow, curve in curves.items():
        others = [points_on(c, np.linspace(0, 1, 200)) for other, c in curves.items() if other != arrow]
        taken = np.concatenate(others + [np.array(list(spots.values())).reshape(-1, 2)])
        own = points_on(curve, times)
        room = np.linalg.norm(own[:, None] - taken[None], axis=2).min(1)
        spots[arrow] = own[np.argmax(np.minimum(room, 0.3) - 0.1 * abs(times - 0.5))]
    return spots


def draw_box(axes, x: float, y: float, name: str, colour: str) -> None:
    "Draw one package."
    corner = (x - BOX[0]/2 + 0.06, y - BOX[1]/2 + 0.06)
    axes.add_patch(FancyBboxPatch(corner, BOX[0] - 0.12, BOX[1] - 0.12, boxstyle='round,pad=0.06',
                                  fc='white', ec=colour, lw=1.6, zorder=4))
    words = name.replace('open_', 'open_\n')                                # the only name wider than a box
    axes.text(x, y - 0.01, words, ha='center', va='center', fontsize=8, color='#222222', zorder=5)


def draw_arrows(axes, arrows: dict, curves: dict) -> None:
    "Draw the arrows, each with its number."
    spots = label_spots(curves)
    for arrow, curve in curves.items():
        count = len(arrows[arrow])
        colour = GREY if arrow[1] in GROUND else COLOUR_OF.get(arrow[0], GREY)
        path = Curve(curve, [Curve.MOVETO] + [Curve.CURVE4] * 3)
        axes.add_patch(FancyArrowPatch(path=path, arrowstyle='-|>', mutation_scale=7, color=colour,
                                       lw=0.8 + 0.16 * count, shrinkA=0, shrinkB=0))
        axes.text(*spots[arrow], count, ha='center', va='center', fontsize=8, color=colour, zorder=3,
                  bbox={'fc': 'white', 'ec': 'none', 'boxstyle': 'round,pad=0.12'})


def draw(arrows: dict, out: Path) -> None:
    "Draw the packages as a row and the arrows as arches; save the picture with few colours."
    present = set().union(*arrows)
    row = [package for package in GROUND + LAYERS if package in present]
    places = {package: place for place, package in enumerate(row)}
    above = [ends for ends in arrows if set(ends) <= set(row) and ends[1] not in GROUND]
    below = [ends for ends in arrows if set(ends) <= set(row) and ends[1] in GROUND]
    curves = arches(above, places, 1) | arches(below, places, -1)
    heights = [points_on(curve, [0.5])[0, 1] for curve in curves.values()]
    low = min(heights) - 0.75
    high = max(heights) + 0.2
    width = len(row) + 1.1
    figure = Figure((UNIT * width, UNIT * (high - low)), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.55, width - 0.55), ylim=(low, high))
    axes.axis('off')
    draw_arrows(axes, arrows, curves)
    for package in row:
        draw_box(axes, places[package], 0, package, COLOUR_OF.get(package, GREY))
    for number, package in enumerate(package for package in TOP if package in present):
        draw_box(axes, len(row), 0.58 * (number - 1), package, '#CCCCCC')
    used = {ends[1] for ends in below}
    caption = CAPTION.format(' and '.join(package for package in GROUND if package in used))
    axes.text(-0.43, low + 0.1, caption, fontsize=8.5, va='bottom', color='#333333')
    figure.savefig(out, facecolor='white')
    Image.open(out).convert('RGB').quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', nargs='?', type=Path, default=ROOT/'rssqa', help='the package to read')
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 if an import leads up')
    parser.add_argument('--out', type=Path, default=ROOT/'nbs/images/packages.png')
    args = parser.parse_args()
    arrows = find_arrows(args.folder.resolve())
    if not args.check:
        return draw(arrows, args.out)
    faults = check(arrows)
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == '__main__':
    main()
