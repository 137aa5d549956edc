"""Write README.md from nbs/index.ipynb, without Quarto: `readme.py [--check]`."""
import argparse, posixpath, re, sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
HIDDEN = re.compile(r'^#\|\s*(hide|default_exp|export|include:\s*false)\b', re.M)
NO_ECHO = re.compile(r'^#\|\s*echo:\s*false\b', re.M)
# relative links, which the README sees from one folder higher
LINK = re.compile(r'\]\((?!\w+:|#|/)([^)\s]+)')


def from_root(match: re.Match) -> str: return '](' + posixpath.normpath('nbs/' + match[1])


def markdown_table(html: str) -> str:
    "Turn the HTML of a DataFrame without its index into a Markdown table."
    rows = [[part.get_text() for part in row(['th', 'td'])][1:] for row in BeautifulSoup(html, 'html.parser')('tr')]
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join([lines[0], '|---' * len(rows[0]) + '|', *lines[1:]])


def outputs(cell):
    "Yield the outputs of a cell as Markdown; pictures are left out."
    for out in cell.outputs:
        data = out.get('data', {})
        text = out.get('text') or data.get('text/plain', '')
        if 'text/markdown' in data: yield LINK.sub(from_root, data['text/markdown'].strip())
        elif 'class="dataframe"' in data.get('text/html', ''): yield markdown_table(data['text/html'])
        elif text and not any(kind.startswith('image/') for kind in data):
            yield '\n'.join('    ' + line for line in text.rstrip().splitlines())


def blocks(nb):
    "Yield the visible parts of a notebook as Markdown."
    for cell in nb.cells:
        if cell.cell_type == 'markdown': yield LINK.sub(from_root, cell.source.strip())
        if cell.cell_type != 'code' or HIDDEN.search(cell.source): continue
        source = DIRECTIVE.sub('', cell.source).strip()
        if source and not NO_ECHO.search(cell.source): yield f'```python\n{source}\n```'
        yield from outputs(cell)


def readme(root: Path = ROOT) -> str:
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    # the site needs full links to files of the project, the README does not
    here = '{git_url}/blob/{branch}/'.format(**ini['DEFAULT'])
    note = '<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->'
    text = '\n\n'.join([note, *blocks(nbformat.read(root/'nbs/index.ipynb', as_version=4))]) + '\n'
    return text.replace(f']({here}', '](')


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--check', action='store_true', help='change nothing, exit 1 if README.md is not current')
    target = ROOT/'README.md'
    text = readme()
    if not ap.parse_args().check: target.write_text(text, encoding='utf-8')
    elif not target.exists() or target.read_text(encoding='utf-8') != text:
        sys.exit('README.md is not current: run `uv run python tools/readme.py`')


if __name__ == '__main__': main()
