"""Plant small faults in the package, one at a time, and ask whether tests notice: `python tools/plant_faults.py`.

A function is drawn at random among all of rssqa, then a place in it, and a change of the kind people make: a
comparison or sign turned round, a number off by one, `and` for `or`, `min` for `max`, a `not` or an `abs`
forgotten, a keyword argument dropped. The tests that import the module and its lesson run on a copy of the
checkout; they notice if one fails. Rows are added to a table as they come, so the same call goes on where one
was stopped. A change may be without effect: read the survivors."""
import argparse, ast, os, random, re, shutil, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = {ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.Eq: '!=', ast.NotEq: '=='}
SIGNS = {ast.Add: '-', ast.Sub: '+', ast.Mult: '/', ast.Div: '*'}
CALLS = dict(max='min', min='max', any='all', all='any', argmax='argmin', argmin='argmax', idxmax='idxmin',
             idxmin='idxmax', mean='sum', maximum='minimum', minimum='maximum', upper='lower', lower='upper')
SKIPPED = ('cli.py', 'all.py', '__init__.py', '_modidx.py')
LIMIT = 900                                                                # seconds for the tests of one fault


def functions(path: Path) -> list:
    "List the functions of a module that have a body to change, methods too."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [node for node in found if list(changes(node))]


def changes(function):
    "Yield (node, text in its place, kind of fault) for each change of a function; the text may use {}."
    for statement in function.body:
        for node in ast.walk(statement): yield from changes_of(node)


def changes_of(node):
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        pattern = f'{{left}} {COMPARISONS[type(node.ops[0])]} {{right}}'
        yield node, (pattern, node.left, node.comparators[0]), 'comparison'
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS and not is_path(node):
        yield node, (f'{{left}} {SIGNS[type(node.op)]} {{right}}', node.left, node.right), 'sign'
    if isinstance(node, ast.BoolOp) and len(node.values) == 2:
        word = 'or' if isinstance(node.op, ast.And) else 'and'
        yield node, ('{left} ' + word + ' {right}', *node.values), 'and, or'
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node, ('{left}', node.operand, node.operand), 'not, minus'
    if isinstance(node, (ast.If, ast.IfExp)): yield node.test, ('not ({left})', node.test, node.test), 'condition'
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield node, (repr(node.value + 1), node, node), 'number'
    if isinstance(node, ast.Call): yield from changes_of_call(node)


def is_path(node) -> bool: # folder/'name': another sign would raise at once
    texts = (isinstance(side, ast.JoinedStr) or isinstance(getattr(side, 'value', 0), str)
             for side in (node.left, node.right))
    return any(texts)


def changes_of_call(node):
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, 'attr', '')
    if name == 'abs' and isinstance(node.func, ast.Name): yield node, ('({left})', node.args[0], node.args[0]), 'abs'
    if name == 'abs' and isinstance(node.func, ast.Attribute):
        yield node, ('{left}', node.func.value, node.func.value), 'abs'
    if name in CALLS: yield node.func, (CALLS[name], node.func, node.func), 'other call'
    for keyword in node.keywords:
        if keyword.arg: yield keyword, ('', keyword, keyword), 'keyword'


def planted(text: str, change) -> str:
    "Return the text of a module with a change made."
    node, (pattern, left, right), kind = change
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines: starts.append(starts[-1] + len(line.encode()))
    data = text.encode()

    def span(part):
        return starts[part.lineno - 1] + part.col_offset, starts[part.end_lineno - 1] + part.end_col_offset

    def source(part): return data[slice(*span(part))].decode()

    first, last = span(node)
    new = pattern.format(left=source(left), right=source(right))
    if kind == 'other call' and isinstance(node, ast.Attribute): new = f'{source(node.value)}.{new}'
    after = data[last:]
    if kind == 'keyword': after = re.sub(rb'^\s*,\s*', b'', after)
    return (data[:first] + new.encode() + after).decode()


def draw(rng, root: Path):
    "Draw a module, a function and a change; each function is as likely as any other."
    modules = [p for p in sorted((root/'rssqa').rglob('*.py')) if p.name not in SKIPPED]
    everything = [(path, function) for path in modules for function in functions(path)]
    while True:
        path, function = rng.choice(everything)
        change = rng.choice(list(changes(function)))
        text = path.read_text(encoding='utf-8')
        changed = planted(text, change)
        try: ast.parse(changed)
        except SyntaxError: continue
        if ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)): return path, function, change, text, changed


def tests_of(path: Path, root: Path) -> list[str]:
    "List the arguments of pytest: test files that import a module, and its lesson."
    dotted = '.'.join(path.relative_to(root).with_suffix('').parts)
    package, _, name = dotted.rpartition('.')
    patterns = (rf'\b{re.escape(dotted)}\b', rf'from {re.escape(package)} import [^\n]*\b{name}\b')
    files = []
    for test in sorted((root/'tests').glob('test_*.py')):
        if any(re.search(p, test.read_text(encoding='utf-8')) for p in patterns): files.append(str(test))
    source = re.search(r'File to edit: (\S+)', path.read_text(encoding='utf-8'))
    lesson = Path(source[1]).name.rstrip('.') if source else ''
    files.sort(key=lambda file: name not in file)                          # its own tests first
    return files + [f'{root}/tests/test_notebooks.py::test_notebook[{lesson}]']


def is_caught(root: Path, arguments: list[str]) -> bool:
    env = os.environ | dict(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE='1')
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '0', '-p', 'no:cacheprovider', *arguments]
    try: run = subprocess.run(command, cwd=root, env=env, capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired: return True
    return run.returncode == 1 or run.returncode == 2


def first_difference(old: str, new: str) -> tuple[int, str, str]: # line number, before, after
    pairs = zip(old.splitlines(), new.splitlines())
    return next((i, a.strip(), b.strip()) for i, (a, b) in enumerate(pairs, 1) if a != b)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--faults', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=ROOT/'data/results/planted_faults.csv')
    args = parser.parse_args()
    rng = random.Random(args.seed)
    done = pd.read_csv(args.out).to_dict('records') if args.out.exists() else []
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)/'rssqa'
        ignored = shutil.ignore_patterns('.venv', '.git', '__pycache__', '*.egg-info')
        shutil.copytree(ROOT, root, ignore=ignored)
        for number in range(args.faults):
            path, function, change, text, changed = draw(rng, root)
            if number < len(done): continue
            line, before, after = first_difference(text, changed)
            path.write_text(changed, encoding='utf-8')
            caught = is_caught(root, tests_of(path, root))
            path.write_text(text, encoding='utf-8')
            done.append(dict(module=str(path.relative_to(root)), function=function.name, line=line, kind=change[2],
                             before=before, after=after, caught=caught))
            pd.DataFrame(done).to_csv(args.out, index=False)
            verb = 'caught' if caught else 'SURVIVED'
            print(f'{number + 1:3} {verb} {path.name} {function.name}: {before} -> {after}', flush=True)
    caught = sum(row['caught'] for row in done)
    print(f'{caught} of {len(done)} caught')


if __name__ == '__main__':
    main()
