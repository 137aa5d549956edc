"""Find words of the first edition that the field does not use: `uv run python tools/words.py`; exits 1 if there is one.

Retired words are searched in every text of nbs/, rssqa/, tests/, tools/ and data/results/, file names and notebook
outputs included; unclear ones only where they are a name in code. Old column names of committed tables live in
data/tables/renamed.json, which is not searched."""
import ast, json, re, sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEARCHED = ('nbs', 'rssqa', 'tests', 'tools', 'data/results')
PASSED_OVER = re.compile(r'/(\.|__pycache__|_proc|_docs)|\.(png|jpg|parquet)$|tools/words\.py$')
RETIRED = re.compile('jury|juries|juror|witness|testimony|testimonies|verdict|convene', re.IGNORECASE)
UNCLEAR = ('told', 'said', 'seen', 'held', 'lost', 'odd', 'mine', 'everyone')   # as names in code
NAME_FIELDS = ('id', 'name', 'asname', 'arg', 'attr', 'rest')                   # where ast keeps names
ENCODED = re.compile(r'[\w+/=]{70,}')                                           # pictures inside notebooks
MAGIC = re.compile(r'^( *)[%!](?=\w).*$', re.MULTILINE)


def texts_of(path: Path) -> list:
    "List the texts of a file, its own name first: where, what, and whether it is code."
    where = str(path.relative_to(ROOT))
    text = path.read_text(encoding='utf-8', errors='replace')
    if path.suffix != '.ipynb':
        return [(where, where, False), (where, text, path.suffix == '.py')]
    texts = [(where, where, False)]
    for number, cell in enumerate(json.loads(text)['cells']):
        source = ''.join(cell['source'])
        output = json.dumps(cell.get('outputs', ''), ensure_ascii=False)
        is_code = cell['cell_type'] == 'code' and not source.startswith('%%')
        texts.append((f'{where} cell {number}', source, is_code))
        texts.append((f'{where} output {number}', ENCODED.sub('', output), False))
    return texts


def names_in(code: str) -> list:
    "List the unclear names of some code, each with its line."
    found = []
    for node in ast.walk(ast.parse(MAGIC.sub(r'\1pass', code))):
        names = [getattr(node, field, None) for field in NAME_FIELDS]
        found += [(name, node.lineno) for name in names if name in UNCLEAR]
    return found


def files_to_search() -> list:
    "List the files in which no retired word and no unclear name should be."
    files = []
    for folder in SEARCHED:
        for path in sorted((ROOT/folder).rglob('*')):
            where = path.relative_to(ROOT).as_posix()
            if path.is_file() and not PASSED_OVER.search('/' + where):
                files.append(path)
    return files


def find_words() -> dict:
    "Find every retired word and unclear name: word -> places."
    places = defaultdict(list)
    for path in files_to_search():
        for where, text, is_code in texts_of(path):
            for match in RETIRED.finditer(text):
                line = text.count('\n', 0, match.start()) + 1
                places[match.group().lower()].append(f'{where}:{line}')
            for name, line in names_in(text) if is_code else []:
                places[f'{name} (a name)'].append(f'{where}:{line}')
    return places


def main():
    places = find_words()
    for word in sorted(places, key=lambda word: -len(places[word])):
        print(f'{word}: {len(places[word])}, first', ', '.join(places[word][:3]))
    sys.exit(1 if places else 0)


if __name__ == '__main__':
    main()
