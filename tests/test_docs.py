"""The site without Quarto: every page through nbdev's own processing and pandoc, then every internal link.

A page takes about a second and pages are shared out among the workers, so 30 notebooks cost 15-30 s on two cores.
"""
import os, re, warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest
import yaml
from filelock import FileLock

from forked import run_forked
from test_house import settings
from test_notebooks import ROOT, name

PAGES = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def site() -> Path:
    "The folder in which all workers of this run put their pages."
    return Path(os.environ['RSSQA_TEST_RUN'])/'site'


def page(path: Path) -> Path:
    "Where a notebook's page goes: as nbdev names it, without the number."
    return site() / path.relative_to(ROOT / 'nbs').with_name(
        re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.name.lower())
    ).with_suffix('.html')


def visible(cell):
    "Yield the Markdown of one processed cell: source unless echo is off, then its richest outputs."
    options = dict(re.findall(r'^#\|\s*([\w-]+):\s*(\S+)', cell.source, re.M))
    if cell.cell_type in ('markdown', 'raw'): yield cell.source
    if cell.cell_type != 'code' or options.get('include') == 'false': return
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    if source and options.get('echo') != 'false': yield f'```python\n{source}\n```'
    if options.get('output') == 'false': return
    for out in cell.get('outputs', []):
        if out['output_type'] == 'error': raise ValueError(f'a saved error: {out["ename"]}: {out["evalue"]}')
        data = {
            kind: ''.join(text) for kind, text in out.get('data', {}).items() if isinstance(text, (str, list))
        }
        text = ''.join(out.get('text', '')) or data.get('text/plain', '')
        if 'text/markdown' in data: yield data['text/markdown']
        elif picture := next((k for k in data if k.startswith('image/')), None):
            yield f'![](picture.{picture[6:]})'
        elif 'text/html' in data: yield f'```{{=html}}\n{data["text/html"]}\n```'
        elif text: yield f'```\n{text}\n```'


def make_page(path: Path, target: Path):
    "Process a notebook as nbdev_docs does, and convert it; any warning is an error."
    import nbdev.serve_drv, pypandoc
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults
    processed = target.with_name(path.name)
    os.chdir(ROOT)                                       # where settings.ini lies
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        nbdev.serve_drv.main((path, processed, FilterDefaults))
    if mixed := [str(w.message) for w in found if 'imports and other code' in str(w.message)]:
        raise ValueError(mixed[0])
    nb = read_nb(processed)
    front = next((c.source for c in nb.cells if c.cell_type == 'raw' and c.source.startswith('---')), '')
    body = [part for c in nb.cells if hasattr(c, 'source') and c.source != front for part in visible(c)]
    text = '\n\n'.join([front.strip(), *body]) + '\n'
    pypandoc.convert_text(
        text,
        'html',
        format='markdown',
        outputfile=f'{target}.part',
        extra_args=['-s', '--mathml', '--toc', '--fail-if-warnings'],
    )
    os.replace(f'{target}.part', target)


def made_page(path: Path) -> str:
    "Make the page unless some worker has; return why it failed, or an empty string."
    target = page(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{target}.lock'):
        return '' if target.exists() else run_forked(make_page, path, target, limit_s=300)


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_page(path):
    if why := made_page(path): pytest.fail(f'{name(path)}\n{why}', pytrace=False)


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], {''}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def broken_links(folder: Path, source: Path = ROOT/'nbs') -> list[str]:
    "Internal links of the pages in a folder that lead to no page, no anchor or no file."
    ini = settings()
    home = f'{ini["doc_host"]}{ini["doc_baseurl"]}/'
    pages = {
        p.relative_to(folder).as_posix(): Links(p.read_text(encoding='utf-8')) for p in folder.rglob('*.html')
    }
    broken = []
    for here, parsed in pages.items():
        for link in parsed.links:
            url = urlparse(urljoin(home + here, link))
            if not url.geturl().startswith(home) or link.startswith('picture.'): continue
            there = unquote(url.path).removeprefix(urlparse(home).path) or 'index.html'
            if there.endswith('.ipynb'):
                there = (
                    Path(there)
                    .with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(there).name.lower()))
                    .with_suffix('.html')
                    .as_posix()
                )
            if there not in pages and not (source/there).is_file(): broken.append(f'{here}: {link}')
            elif there in pages and unquote(url.fragment) not in pages[there].ids:
                broken.append(f'{here}: {link} (no such anchor)')
    return broken


def test_every_internal_link_resolves():
    failed = [why for path in PAGES if (why := made_page(path))]
    assert not failed, failed[0]
    assert broken_links(site()) == []


def test_broken_links_are_seen(tmp_path):
    home = 'https://rssqa.github.io/rssqa/'
    (tmp_path/'core.html').write_text('<h2 id="errors">x</h2>')
    good = [
        'core.html',
        '00_core.ipynb#errors',
        home + 'core.html#errors',
        '#top',
        'https://example.org/x',
        '_quarto.yml',
    ]
    bad = ['gone.html', '03_gone.ipynb', home + 'core.html#nothing', '#nowhere', 'images/none.png']
    (tmp_path/'index.html').write_text('<p id="top">' + ''.join(f'<a href="{x}">x</a>' for x in good + bad))
    assert [b.split()[1] for b in broken_links(tmp_path)] == bad


def test_site_configuration_is_one_file():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert site['format']['html']['html-math-method'] == 'mathml' and site['execute']['enabled'] is False
