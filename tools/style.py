"""Measure how easy code is to read: `uv run python tools/style.py [--beside | --modules]`.

All `.py` files count except `_modidx.py` and `__init__.py`. Lines: those not blank. Function: from `def` to
its last line, methods and nested ones too. Long: share of the lines over 120 characters. Tokens: code tokens
on each line that has one; a string counts once, on its first line. Per 1,000 lines, blank ones too: `;`,
comprehensions with another inside or with two `for`, lambdas, and tuples given to tuples (`a, b = x, y`)."""
import argparse, ast, importlib.metadata, importlib.util, io, re, subprocess, sys
import tarfile, tempfile, tokenize, zipfile
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
NEIGHBOURS = 'claudette fastcore timm segmentation-models-pytorch torchgeo neuralforecast'.split()
LONG = 120
LAYOUT = 'COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER'.split()          # tokens that are not code
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
RATES = ['`;`', 'nested comprehensions', 'lambdas', 'tuple assignments']        # counted per 1,000 lines


def count_tokens(text: str) -> tuple:
    "Count the code tokens of each line, and all semicolons."
    lines = {}
    semicolons = 0
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if depth == 0 and kind not in LAYOUT:
            lines[token.start[0]] = lines.get(token.start[0], 0) + 1
        semicolons += kind == 'OP' and token.string == ';'
        depth += (kind == 'FSTRING_START') - (kind == 'FSTRING_END')        # Python 3.12 splits f-strings
    return list(lines.values()), semicolons


def is_nested(node) -> bool:
    "Recognise a comprehension that holds another one or has two `for`."
    if not isinstance(node, COMPREHENSIONS):
        return False
    inside = [part for part in ast.walk(node) if isinstance(part, COMPREHENSIONS)]
    return len(inside) > 1 or len(node.generators) > 1


def is_tuple_assignment(node) -> bool:
    "Recognise `a, b = x, y`."
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    return isinstance(target, ast.Tuple) and len(target.elts) == len(node.value.elts)


def examine(path: Path) -> dict:
    "Count what one module holds."
    text = path.read_text(encoding='utf-8')
    tokens, semicolons = count_tokens(text)
    nodes = list(ast.walk(ast.parse(text)))
    return {'path': path,
            'lengths': [len(line) if line.strip() else 0 for line in text.splitlines()],
            'tokens': tokens,
            'functions': [n.end_lineno - n.lineno + 1 for n in nodes if isinstance(n, FUNCTIONS)],
            '`;`': semicolons,
            'nested comprehensions': sum(map(is_nested, nodes)),
            'lambdas': sum(isinstance(node, ast.Lambda) for node in nodes),
            'tuple assignments': sum(map(is_tuple_assignment, nodes))}


def examine_all(folder: Path) -> pd.DataFrame:
    "Count what the hand-written modules of a package hold, one row a module."
    files = [path for path in sorted(folder.rglob('*.py')) if path.name not in ('_modidx.py', '__init__.py')]
    return pd.DataFrame([examine(path) for path in files])


def summarise(counts: pd.DataFrame) -> dict:
    "Turn the counts of some modules into one row of the table."
    lengths = np.concatenate(counts.lengths.tolist())
    tokens = np.concatenate(counts.tokens.tolist())
    functions = np.concatenate(counts.functions.tolist())
    filled = lengths[lengths > 0]
    row = {'files': len(counts),
           'lines': f'{len(filled):,}',
           'median function': f'{np.median(functions):g}' if len(functions) else '',
           'long %': f'{100 * np.mean(filled > LONG):.1f}',
           'tokens a line': f'{tokens.mean():.1f}',
           '90th percentile': f'{np.percentile(tokens, 90):.0f}'}
    return row | {name: f'{1000 * counts[name].sum() / len(lengths):.1f}' for name in RATES}


def print_table(rows: list) -> None:
    "Print dictionaries as a Markdown table."
    print('| ' + ' | '.join(rows[0]) + ' |')
    print('| --- |' + ' ---: |' * (len(rows[0]) - 1))
    for row in rows:
        print('| ' + ' | '.join(map(str, row.values())) + ' |')


def download(package: str, scratch: Path) -> tuple:
    "Fetch and unpack a package without installing it; give its source folder and version."
    pip = [sys.executable, '-m', 'pip'] if importlib.util.find_spec('pip') else ['pip']
    options = ['--quiet', '--disable-pip-version-check', '--no-deps', '--no-binary', ':none:']
    archives = scratch/'archives'/package
    subprocess.run([*pip, 'download', *options, '--dest', archives, package], check=True)
    archive = next(archives.iterdir())
    if archive.suffix in ('.whl', '.zip'):
        zipfile.ZipFile(archive).extractall(scratch/package)                    # stays in its folder
    else:
        tarfile.open(archive).extractall(scratch/package, filter='data')
    inits = (scratch/package).rglob(package.replace('-', '_') + '/__init__.py')
    version = re.search(r'-(\d[\w.!+]*?)(-|\.tar|\.zip)', archive.name).group(1)
    return min(inits, key=lambda path: len(path.parts)).parent, version


def neighbour(package: str, scratch: Path) -> dict:
    "Make the row of a neighbour: installed here, or downloaded."
    spec = importlib.util.find_spec(package.replace('-', '_'))
    if spec is None:
        folder, version = download(package, scratch)
    else:
        folder = Path(spec.submodule_search_locations[0])
        version = importlib.metadata.version(package)
    return {'package': f'{package} {version}'} | summarise(examine_all(folder))


def compare(packages: tuple) -> list:
    "Make one row for our package and one for each neighbour that can be had."
    rows = [{'package': 'rssqa'} | summarise(examine_all(ROOT/'rssqa'))]
    with tempfile.TemporaryDirectory() as scratch:
        for package in packages:
            try:
                rows.append(neighbour(package, Path(scratch)))
            except (OSError, subprocess.CalledProcessError) as error:
                print(f'{package} is left out: {error}', file=sys.stderr)
    return rows


def worst_modules(number: int = 15) -> list:
    "Make one row for each of our modules with the most tokens a line."
    counts = examine_all(ROOT/'rssqa')
    order = counts.tokens.map(np.mean).sort_values(ascending=False).index[:number]
    rows = []
    for i in order:
        rows.append({'module': counts.path[i].relative_to(ROOT)} | summarise(counts.loc[[i]]))
        del rows[-1]['files']
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--beside', action='store_true', help='measure neighbouring packages too')
    what.add_argument('--modules', action='store_true', help='list our modules with the most tokens a line')
    args = parser.parse_args()
    print_table(worst_modules() if args.modules else compare(NEIGHBOURS if args.beside else ()))


if __name__ == '__main__':
    main()
