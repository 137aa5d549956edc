"""The rules of the house: layers, generated files, packaging, imports, budgets, documentation of functions."""
import ast, importlib.util, io, json, os, re, shutil, subprocess, sys, tokenize, tomllib, zipfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HAND_WRITTEN = {'__init__.py', 'all.py'}
PLAIN = {'path', 'obj', 'ax'}                  # parameters whose name says all
MAX_TEXT_LINES = 30                            # of one text output
NEVER_AT_IMPORT = {
    'open_clip',
    'umap',
    'matplotlib',
    'seaborn',
    'transformers',
    'timm',
    'segmentation_models_pytorch',
    'rasterio',
    'lance',
}


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT/f'tools/{name}.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def settings(root=ROOT):
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def notebooks(root=ROOT):
    return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
def modules(root=ROOT): return sorted(p for p in (root/'rssqa').rglob('*.py') if p.name != '_modidx.py')
def dotted(path, root=ROOT):
    return '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')


def copy_project(target: Path) -> Path:
    "Copy what building and exporting need."
    shutil.copytree(ROOT/'nbs', target/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copytree(ROOT/'rssqa', target/'rssqa', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT/'data'/'models', target/'data'/'models')
    for name in 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE':
        shutil.copy(ROOT/name, target)
    return target


def python(*args, cwd, **env) -> str:
    "Run a fresh Python outside the project and return what it printed."
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, env=os.environ | env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------- layers

NOTEBOOK = re.compile(r'File to edit: \S*/(\d+)_(\S+)\.ipynb')


def layer(path: Path) -> int | None:
    "The number of the notebook a module comes from; None for a hand-written module."
    found = NOTEBOOK.search(path.read_text(encoding='utf-8'))
    return found and int(found[1])


def imports(path: Path, root: Path):
    "Yield the names of the package's modules that a file imports, at whatever depth."
    package = (
        dotted(path, root).split('.') if path.name == '__init__.py' else dotted(path, root).split('.')[:-1]
    )
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            stem = (
                '.'.join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            yield stem
            yield from (f'{stem}.{a.name}' for a in node.names)


def upward_imports(root=ROOT) -> list[str]:
    "Describe every import of a module whose number is not lower."
    layers = {dotted(p, root): n for p in modules(root) if (n := layer(p)) is not None}
    found = []
    for path in modules(root):
        name = dotted(path, root)
        if name not in layers: continue
        for other in sorted(set(imports(path, root)) & layers.keys()):
            if layers[other] >= layers[name]:
                found.append(f'{name} ({layers[name]}) imports {other} ({layers[other]})')
    return found


def package_spans(root=ROOT) -> dict:
    "Lowest and highest notebook number of each package; a module outside packages is one of its own."
    numbers = {}
    for path in modules(root):
        parts = dotted(path, root).split('.')
        if (n := layer(path)) is not None: numbers.setdefault(parts[1], []).append(n)
    return {package: (min(ns), max(ns)) for package, ns in numbers.items()}


def test_modules_import_only_from_lower_numbers(): assert upward_imports() == []


def test_packages_are_layers():
    "All of a package lies before the next one, so an import from a lower number never runs up a package."
    spans = sorted(package_spans().values())
    assert [(a, b) for a, b in zip(spans, spans[1:]) if a[1] >= b[0]] == []


def test_every_module_has_a_number_and_its_notebook_the_name_of_its_module():
    generated = [p for p in modules() if p.name not in HAND_WRITTEN]
    homes = {dotted(p): NOTEBOOK.search(p.read_text(encoding='utf-8')) for p in generated}
    assert [name for name, home in homes.items() if not home or name != f'rssqa.{home[2]}'] == []


UPWARD = ['from .high.net import f', 'from rssqa.high.net import f', 'import rssqa.high.net', 'from .high import net']


@pytest.mark.parametrize('line', [*UPWARD,
                                  'def f():\n    from rssqa.high import net'])
def test_layer_rule_sees_an_upward_import(tmp_path, line):
    def module(name, source, text=''):
        path = tmp_path/'rssqa'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/{source}.ipynb.\n{text}\n')
    module('low.py', '21_low', line)
    module('high/net.py', '30_high.net', 'from ..low import x')
    assert upward_imports(tmp_path) == ['rssqa.low (21) imports rssqa.high.net (30)']
    assert package_spans(tmp_path) == dict(low=(21, 21), high=(30, 30))


# ---------------------------------------------------------------- generated files

def test_export_leaves_no_difference(tmp_path):
    copy = copy_project(tmp_path)
    for path in modules(copy):
        if path.name not in HAND_WRITTEN: path.unlink()
    (copy/'rssqa/_modidx.py').unlink(missing_ok=True)
    python('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    made, here = (
        {p.relative_to(r).as_posix(): p.read_text(encoding='utf-8') for p in (r / 'rssqa').rglob('*.py')}
        for r in (copy, ROOT)
    )
    assert [n for n in made.keys() | here.keys() if made.get(n) != here.get(n)] == [], (
        'run `uv run nbdev_export`'
    )


def test_readme_is_current():
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == load_tool('readme').readme(), (
        'run `uv run python tools/readme.py`'
    )


def test_digests_of_committed_weights_are_current():
    assert not load_tool('digests').main(check=True), 'run `uv run python tools/digests.py`'


def test_readme_gives_the_command_that_ci_runs():
    commands = re.findall(
        r'^(pip install -q uv && uv run \S+(?: \S+)*?)(?:\s{2,}#.*)?$',
        (ROOT / 'README.md').read_text(encoding='utf-8'),
        re.M,
    )
    assert commands == ['pip install -q uv && uv run rssqa demo', 'pip install -q uv && uv run pytest -q']
    assert commands[1] in (ROOT/'.ci/run').read_text(encoding='utf-8').splitlines()


def test_settings_and_pyproject_agree():
    ini = settings()
    project = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']
    assert (project['name'], project['requires-python']) == (ini['lib_name'], f'>={ini["min_python"]}')
    assert f'__version__ = "{ini["version"]}"' in (ROOT/'rssqa/__init__.py').read_text(encoding='utf-8')
    assert {'dependencies', 'optional-dependencies', 'version', 'scripts'} <= set(project['dynamic'])
    assert f'## {ini["version"]}' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')


def test_lock_is_current(tmp_path):
    uv = os.environ.get('UV') or shutil.which('uv')
    if not uv: pytest.skip('uv is not on the path')
    done = subprocess.run([uv, 'lock', '--check', '--offline'], cwd=ROOT, capture_output=True, text=True)
    if done.returncode and 'needs to be updated' not in done.stderr:
        pytest.skip(f'uv cannot tell offline: {done.stderr.strip()[-200:]}')
    assert done.returncode == 0, done.stderr


def test_lock_names_only_pypi():
    hosts = set(re.findall(r'https?://([^/"]+)', (ROOT/'uv.lock').read_text(encoding='utf-8')))
    assert hosts == {'pypi.org', 'files.pythonhosted.org'}


# ---------------------------------------------------------------- words and lines

def test_no_word_of_the_first_edition_is_left(): assert load_tool('words').find_words() == {}


def test_lines_follow_the_rules():
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_picture_of_packages_shows_no_upward_import(capsys):
    layers = load_tool('layers')
    assert layers.check(layers.find_arrows(ROOT/'rssqa')) == []


# ---------------------------------------------------------------- packaging and imports

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Build the wheel from a copy, offline, and unpack it: (folder with the package, METADATA)."
    source = copy_project(tmp_path_factory.mktemp('source'))
    out = tmp_path_factory.mktemp('wheel')
    python('-c', f'from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})', cwd=source)
    with zipfile.ZipFile(next(out.glob('*.whl'))) as z: z.extractall(out/'site')
    return out/'site', next((out/'site').glob('*.dist-info/METADATA')).read_text(encoding='utf-8')


def test_wheel_holds_every_module(wheel):
    shipped = {p.relative_to(wheel[0]).as_posix() for p in (wheel[0]/'rssqa').rglob('*') if p.is_file()}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT/'rssqa').rglob('*.py')} | {'rssqa/py.typed'}
    pack = {
        f'rssqa/models/{p.relative_to(ROOT / "data" / "models").as_posix()}'
        for p in (ROOT / 'data' / 'models').rglob('*')
        if p.suffix in ('.json', '.safetensors')
    }
    apps = {f'rssqa/apps/{p.name}' for p in (ROOT/'nbs'/'apps').glob('*.ipynb')}
    assert wanted <= shipped and pack and pack <= shipped and apps and apps <= shipped
    assert not [p for p in wheel[0].iterdir() if p.name != 'rssqa' and p.suffix != '.dist-info'], (
        'only rssqa belongs in the wheel'
    )


def test_wheel_requires_what_settings_say(wheel):
    from packaging.requirements import Requirement
    asked = [Requirement(r) for r in re.findall(r'^Requires-Dist: (.*)$', wheel[1], re.M)]
    runtime = {str(r) for r in asked if not r.marker}
    assert runtime == {str(Requirement(r)) for r in settings()['requirements'].split()}
    assert not [r for r in runtime if r.startswith(('nbdev', 'fastcore', 'execnb'))]
    assert f'Requires-Python: >={settings()["min_python"]}' in wheel[1] and 'Provides-Extra: dev' in wheel[1]


@pytest.fixture(scope='module')
def imported(wheel, tmp_path_factory):
    "Import every module from the unpacked wheel, in one process outside the project: (files, modules loaded, errors)."
    names = sorted(dotted(p, wheel[0]) for p in (wheel[0]/'rssqa').rglob('*.py'))
    code = f'''
import importlib, json, sys
files, errors = [], []
for name in {names!r}:
    try: files.append(importlib.import_module(name).__file__)
    except Exception as e: errors.append(f'{{name}}: {{e!r}}')
print(json.dumps([files, sorted(sys.modules), errors]))'''
    return json.loads(
        python('-c', code, cwd=tmp_path_factory.mktemp('elsewhere'), PYTHONPATH=str(wheel[0])).splitlines()[
            -1
        ]
    )


def test_every_module_imports_from_the_wheel(wheel, imported):
    assert imported[2] == []
    assert all(Path(f).is_relative_to(wheel[0]) for f in imported[0])


def test_modules_import_no_heavy_library(imported):
    assert NEVER_AT_IMPORT & set(imported[1]) == set(), 'import these inside the functions that use them'
    assert not {'nbdev', 'fastcore', 'execnb'} & set(imported[1]), (
        'tools of the notebooks are no part of the package'
    )


def import_cost(name, cwd, site) -> tuple[float, set]:
    "Seconds and loaded modules of one import in a fresh process."
    code = f'import sys, time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t, *sys.modules)'
    seconds, *loaded = python('-c', code, cwd=cwd, PYTHONPATH=str(site)).split()
    return float(seconds), set(loaded)


def test_import_is_light(wheel, tmp_path):
    runs = [import_cost('rssqa', tmp_path, wheel[0]) for _ in range(3)]
    assert {'torch', 'open_clip', 'umap', 'matplotlib', 'pandas'} & runs[0][1] == set()
    assert min(seconds for seconds, _ in runs) < 0.5


def test_help_loads_no_torch(wheel, tmp_path):
    start = 'import sys; from rssqa.cli import main; sys.argv = ["rssqa", "--help"]'
    code = start + '\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules)'
    assert {'torch', 'open_clip', 'umap', 'matplotlib'} & set(
        python('-c', code, cwd=tmp_path, PYTHONPATH=str(wheel[0])).splitlines()[-1].split()
    ) == set()


# ---------------------------------------------------------------- notebooks

def test_notebooks_are_clean_and_within_budget():
    assert [fault for path in notebooks() for fault in load_tool('clean').faults(path)] == []


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.name)
def test_text_outputs_are_short(path):
    long = [
        text[:60]
        for cell in nbformat.read(path, 4).cells
        for out in cell.get('outputs', [])
        if (text := out.get('text') or out.get('data', {}).get('text/plain', '')).count('\n') > MAX_TEXT_LINES
    ]
    assert long == []


def listed(node):
    "Yield every notebook that a sidebar names."
    for item in node:
        if isinstance(item, str):
            yield from sorted(p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs').glob(item)) or [item]
        else: yield from listed(item.get('contents', [item['href']] if 'href' in item else []))


def test_sidebar_lists_every_notebook_once():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    names = list(listed(site['website']['sidebar']['contents']))
    assert sorted(names) == sorted(p.relative_to(ROOT / 'nbs').as_posix() for p in notebooks()), (
        'bring _quarto.yml up to date'
    )
    numbered = [n for n in names if n[:2].isdigit() and '/' not in n]
    assert [n.split('_')[0] for n in numbered] == sorted(n.split('_')[0] for n in numbered), (
        'the sidebar follows the layers'
    )
    assert (ROOT / 'nbs/_quarto.yml').read_text(
        encoding='utf-8'
    ) == 'metadata-files: [../_quarto.yml, nbdev.yml]\n'


def exports(nb):
    return [c for c in nb.cells if c.cell_type == 'code' and re.search(r'^#\|\s*export', c.source, re.M)]


@pytest.mark.parametrize('path', [p for p in notebooks() if exports(nbformat.read(p, 4))], ids=lambda p: p.name)
def test_lessons_assert_and_pages_have_one_title(path):
    nb = nbformat.read(path, 4)
    lessons = [
        c.source
        for c in nb.cells
        if c.cell_type == 'code' and c not in exports(nb) and not c.source.startswith('#|')
    ]
    assert any(
        isinstance(n, ast.Assert)
        for s in lessons
        for n in ast.walk(ast.parse(re.sub(r'^[%!].*', '', s, flags=re.M)))
    ), 'no lesson asserts anything'
    text = '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown')
    assert len(re.findall(r'^# \S', text, re.M)) == 1 and re.match(r'# .+\n\n?> .+', nb.cells[0].source), (
        'one H1, then a lead after >'
    )
    assert 'import' not in [
        w for c in exports(nb)[1:] for w in re.findall(r'^(import|from) ', c.source, re.M)
    ], 'imports stand alone in the first exported cell'


# ---------------------------------------------------------------- functions

def explains(comment: str, arg, function) -> bool:
    "A comment beside a parameter speaks of it; one beside a one-line signature must name it."
    return bool(comment) and (
        arg.lineno != function.lineno or re.search(rf'\b{arg.arg}\b', comment) is not None
    )


def undocumented(path: Path) -> list[str]:
    "Public functions and classes without a docstring, and parameters with neither annotation nor comment."
    text = path.read_text(encoding='utf-8')
    tree = ast.parse(text)
    comments = {
        t.start[0]: t.string
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.type == tokenize.COMMENT
    }
    public = next(
        (
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'
        ),
        [],
    )
    found = []
    for node in tree.body:
        if getattr(node, 'name', None) not in public: continue
        if not ast.get_docstring(node): found.append(f'{node.name}: no docstring')
        if isinstance(node, ast.ClassDef): continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        found += [f'{node.name}: {a.arg}' for a in args
                  if not (a.annotation or a.arg in PLAIN or explains(comments.get(a.lineno, ''), a, node))]
    return found


@pytest.mark.parametrize('path', [p for p in modules() if p.name not in HAND_WRITTEN], ids=dotted)
def test_public_names_are_documented(path): assert undocumented(path) == []


def test_undocumented_names_are_seen(tmp_path):
    (tmp_path / 'm.py').write_text(
        "__all__ = ['f', 'g']\ndef f(a, aa): # aa (n,) note\n    'Do.'\n"
        "def g(\n    a, # (N,)\n    b,\n    path,\n    c: int,\n): pass\ndef _h(x): pass\n"
    )
    assert undocumented(tmp_path/'m.py') == ['f: a', 'g: no docstring', 'g: b']


# ---------------------------------------------------------------- no trace of one machine

def text_files(root=ROOT):
    "Yield files that git tracks or would add; all files where there is no git."
    done = (
        subprocess.run(
            ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
            cwd=root,
            capture_output=True,
            text=True,
        )
        if shutil.which('git')
        else None
    )
    skipped = {'.git', '.venv', '_proc', '_docs', 'build', 'dist', '__pycache__', 'cache', 'raw', 'runs'}
    paths = (
        [root / n for n in done.stdout.split('\0') if n]
        if done and done.returncode == 0
        else [p for p in root.rglob('*') if not skipped & set(p.relative_to(root).parts)]
    )
    for path in paths:
        if path.is_file() and path.name != 'uv.lock' and b'\0' not in (data := path.read_bytes())[:8192]:
            yield path, data.decode('utf-8', 'replace')


MACHINE = re.compile(r'(?<![\w.…}~-])/(?:home|root|Users|work|mnt|tmp)/[\w.-]+|[A-Z]:\\Users\\')


def test_no_path_of_one_machine(tmp_path):
    planted = '/' + 'home/ann/data'
    assert MACHINE.search(f'open("{planted}")') and not MACHINE.search('data/home/ann')
    assert [f'{p.relative_to(ROOT)}: {m[0]}' for p, text in text_files() if (m := MACHINE.search(text))] == []
