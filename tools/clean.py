"""Clean notebooks for git: `clean.py [--check] [FILES]`. Keeps outputs, drops noise and traces of a machine."""
import argparse, base64, hashlib, io, re, sys
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
KEEP_META = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
NOISE = [(re.compile(r' at 0x[0-9a-fA-F]{6,}'), ''),                       # memory addresses
         (re.compile(r'/(?:home|root|tmp|work|Users|mnt)/[^\s\'",)]*/'), '…/')]   # paths of one machine
PNG_KB, LIBRARY_KB, TUTORIAL_KB = 60, 250, 400


def shrink_png(data: str) -> str:
    "Palette-reduce a base64 PNG; keep the original where that does not help."
    raw = base64.b64decode(data)
    out = io.BytesIO()
    image = Image.open(io.BytesIO(raw))
    if image.mode == 'P': return data
    image.convert('RGB').quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        out, 'PNG', optimize=True
    )
    return base64.b64encode(out.getvalue()).decode() if len(out.getvalue()) < len(raw) else data


def clean_text(value):
    text = ''.join(value) if isinstance(value, list) else value
    for pattern, new in NOISE: text = pattern.sub(new, text)
    return text


def clean_output(out) -> dict | None:
    "Return the output as it may be committed, or None to drop it."
    if out.output_type == 'stream':
        if out.name == 'stderr': return None
        out.text = clean_text(out.text)
        return out
    if out.output_type in ('display_data', 'execute_result'):
        out.data = {k: v for k, v in out.data.items() if 'widget' not in k}
        if not out.data or any('tqdm' in str(v)[:200] for v in out.data.values()): return None
        for kind, value in out.data.items():
            if kind == 'image/png': out.data[kind] = shrink_png(value.strip())
            elif isinstance(value, (str, list)): out.data[kind] = clean_text(value)
        out.metadata = {}
        if 'execution_count' in out: out.execution_count = None
    return out


def clean_nb(nb):
    "Clean a notebook node in place."
    nb.metadata = KEEP_META
    nb.nbformat, nb.nbformat_minor = 4, 5
    count = {}
    for cell in nb.cells:
        digest = hashlib.blake2b(cell.source.encode(), digest_size=4).hexdigest()
        count[digest] = count.get(digest, 0) + 1
        cell.id = digest if count[digest] == 1 else f'{digest}-{count[digest]}'
        cell.metadata = {}
        if cell.cell_type == 'code':
            cell.execution_count = None
            cell.outputs = [o for o in map(clean_output, cell.outputs) if o is not None]
    return nb


def dumps(nb) -> str: return nbformat.writes(clean_nb(nb), indent=1) + '\n'


def figures(nb):
    for cell in nb.cells:
        for out in cell.get('outputs', []):
            if png := out.get('data', {}).get('image/png'): yield len(png) * 3 // 4


def faults(path: Path) -> list[str]:
    "Everything that keeps a notebook from being committed."
    text = path.read_text(encoding='utf-8')
    found = []
    nb = nbformat.reads(text, as_version=4)
    limit = (
        TUTORIAL_KB
        if path.parent.name in ('tutorials', 'how-to', 'explanations', 'experiments')
        else LIBRARY_KB
    ) * 1024
    if any(o.output_type == 'error' for c in nb.cells for o in c.get('outputs', [])):
        found.append('holds a saved error')
    if len(text) > limit: found.append(f'{len(text) // 1024} KB, limit {limit // 1024}')
    found += [
        f'a figure of {size // 1024} KB, limit {PNG_KB}' for size in figures(nb) if size > PNG_KB * 1024
    ]
    if dumps(nb) != text: found.append('not clean: run `uv run python tools/clean.py`')
    return [f'{path.relative_to(ROOT)}: {f}' for f in found]


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--check', action='store_true', help='change nothing, exit 1 if anything would change')
    ap.add_argument('files', nargs='*', type=Path)
    args = ap.parse_args()
    paths = [p.resolve() for p in args.files] or sorted(
        p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
    )
    if args.check:
        found = [f for p in paths for f in faults(p)]
        print('\n'.join(found) or f'{len(paths)} notebooks are clean')
        sys.exit(bool(found))
    for path in paths:
        old = path.read_text(encoding='utf-8')
        if (new := dumps(nbformat.reads(old, as_version=4))) != old: path.write_text(new, encoding='utf-8')


if __name__ == '__main__': main()
