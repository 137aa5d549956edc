"""A function for every image of a folder: one row or one reason for each entry, resumed exactly, on all cores."""
import json, os, signal, struct, subprocess, sys, time, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import rssqa.quality.folders as module
from rssqa.cli import main
from rssqa.core import BadImage, DataNotFound, Incompatible, as_image, read_json, write_json
from rssqa.quality.folders import SUFFIXES, check_table_path, list_images, plain_name, process_folder, write_table
from rssqa.quality.pack import Pack
from rssqa.quality.recommend import rank_folder, recommend
from trained import METHODS, trained_setup


def brightness(path): return [dict(brightness=float(as_image(path).mean()))]


def write_image(path, seed=0, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(('b.png', 'a.jpg', 'deep/c.TIF', 'deep/d.bmp', 'e.png')):
        write_image(tmp_path/'images'/name, i)
    return tmp_path/'images'


PATHS = ['a.jpg', 'b.png', 'deep/c.TIF', 'deep/d.bmp', 'e.png']


def huge_png(path): # a header of 100,000 x 100,000 pixels
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'') + chunk(b'IEND', b''))


# ---------------------------------------------------------------- every entry

def test_every_entry_gives_a_row_or_a_reason(folder):
    (folder/'dangling.png').symlink_to('gone.png')
    (folder/'loop.png').symlink_to('loop.png')
    (folder/'folder.png').mkdir()
    write_image(folder/'folder.png'/'inside.png')
    os.mkfifo(folder/'pipe.png')
    (folder/'torn.png').write_bytes((folder/'b.png').read_bytes()[:300])
    (folder/'empty.jpg').write_bytes(b'')
    huge_png(folder/'huge.png')
    (folder/'linked').symlink_to(folder/'deep')
    for name in ('notes.txt', 'deep/world.tfw', 'png'): (folder/name).write_text('no image')
    rows, skipped, others = process_folder(folder, brightness)
    assert rows.path.tolist() == sorted([*PATHS, 'folder.png/inside.png'])
    reasons = dict(zip(skipped.path, skipped.reason))
    words = {
        'dangling.png': 'leads nowhere',
        'empty.jpg': 'no image format',
        'folder.png': 'found a folder',
        'huge.png': '100',
        'linked': 'a link to a folder',
        'loop.png': 'leads nowhere',
        'pipe.png': 'device or pipe',
        'torn.png': 'damaged',
    }
    assert list(reasons) == sorted(words) and others == 3
    for path, word in words.items(): assert word in reasons[path].lower() and path in reasons[path], path
    assert len(rows) + len(skipped) == len(list_images(folder).images) + 1


def test_names_that_are_no_text_are_written_as_text(folder, tmp_path):
    name = os.fsdecode(b'caf\xe9.png')
    try: write_image(folder/name)
    except OSError: pytest.skip('this file system has only UTF-8 names')
    (folder/os.fsdecode(b'\xff.jpg')).write_bytes(b'')
    for out in (tmp_path/'t.csv', tmp_path/'t.parquet'):
        rows, skipped, _ = process_folder(folder, lambda path: [dict(a=1)] if 'caf' in path else brightness(path), out)
        assert r'caf\xe9.png' in rows.path.tolist() and skipped.path.tolist() == [r'\xff.jpg']
        read = pd.read_csv(out) if out.suffix == '.csv' else pd.read_parquet(out)
        assert read.path.tolist() == rows.path.tolist()
    assert plain_name('plain.png') == 'plain.png'


def test_a_file_that_is_deleted_meanwhile(folder):
    def delete_the_next(path):
        (folder/'b.png').unlink(missing_ok=True)
        return brightness(path)

    rows, skipped, _ = process_folder(folder, delete_the_next)
    assert rows.path.tolist() == [path for path in PATHS if path != 'b.png']
    assert skipped.path.tolist() == ['b.png'] and 'no image' in skipped.reason[0]


@pytest.mark.parametrize('error', [ValueError('odd\nmore'), MemoryError(), RecursionError('deep'), AssertionError()])
def test_an_unexpected_error_is_the_reason_of_its_image(folder, error):
    def fail(path):
        if path.endswith('b.png'): raise error
        return brightness(path)

    rows, skipped, _ = process_folder(folder, fail)
    assert len(rows) == 4 and skipped.path.tolist() == ['b.png']
    assert type(error).__name__ in skipped.reason[0] and 'b.png' in skipped.reason[0]
    assert '\n' not in skipped.reason[0]


def test_a_function_without_rows_has_a_reason(folder):
    rows, skipped, _ = process_folder(folder, lambda path: [] if path.endswith('b.png') else brightness(path))
    assert len(rows) == 4 and 'no rows' in skipped.reason[0]


def test_a_subfolder_that_cannot_be_searched(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('deep'): raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    rows, skipped, _ = process_folder(folder, brightness)
    assert rows.path.tolist() == ['a.jpg', 'b.png', 'e.png']
    assert skipped.path.tolist() == ['deep'] and 'Permission denied' in skipped.reason[0]


def test_nothing_to_do(tmp_path):
    with pytest.raises(DataNotFound, match='no folder'): process_folder(tmp_path/'gone', brightness)
    (tmp_path/'a.txt').write_text('')
    with pytest.raises(DataNotFound, match='no image.*png'): process_folder(tmp_path, brightness)
    (tmp_path/'a.png').write_text('')
    rows, skipped, others = process_folder(tmp_path, brightness, tmp_path/'t.csv')
    assert rows.empty and len(skipped) == others == 1
    assert {path.name for path in tmp_path.iterdir()} == {'a.txt', 'a.png'}
    assert '.png' in SUFFIXES


# ---------------------------------------------------------------- the table

def test_the_place_of_the_table_is_checked_before_any_work(folder, tmp_path):
    def never(path): pytest.fail('an image was read')

    (tmp_path/'x.csv').mkdir()
    for out in ('t.xlsx', 't', 'gone/t.csv', 'x.csv'):
        with pytest.raises(Incompatible, match='cannot write'): process_folder(folder, never, tmp_path/out)
        with pytest.raises(Incompatible, match='cannot write'): recommend(folder, tmp_path/'no pack', out=tmp_path/out)
    check_table_path(str(tmp_path/'t.parquet'))


def test_text_is_no_formula_in_a_spreadsheet(tmp_path):
    names = ['=1+1.png', '+a', '-b', '@c', '\td', 'plain']
    table = pd.DataFrame(dict(path=names, predicted=-0.5))
    write_table(table, tmp_path/'t.csv')
    read = pd.read_csv(tmp_path/'t.csv')
    assert read.path.tolist() == [*[f"'{name}" for name in names[:-1]], 'plain'] and (read.predicted == -0.5).all()
    write_table(table, tmp_path/'t.parquet')
    assert pd.read_parquet(tmp_path/'t.parquet').path.tolist() == names


def test_a_full_disk_is_a_problem_and_keeps_the_rows(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')

    monkeypatch.setattr(pd.DataFrame, 'to_csv', full)
    with pytest.raises(Incompatible, match='t.csv.*No space left'): process_folder(folder, brightness, tmp_path/'t.csv')
    assert len((tmp_path/'t.csv.part.jsonl').read_bytes().splitlines()) == 5


def test_two_calls_never_write_one_table(folder, tmp_path):
    out = tmp_path/'t.csv'
    refused = []

    def call_again(path):
        with pytest.raises(Incompatible, match='t.csv.*(?i:another call is writing it)') as e:
            process_folder(folder, brightness, out)
        refused.append(e.value.todo)
        return brightness(path)

    rows = process_folder(folder, call_again, out, workers=1).rows
    assert len(refused) == 5 and len(rows) == 5
    assert process_folder(folder, brightness, out).rows.equals(rows)              # the claim has ended
    assert sorted(path.name for path in tmp_path.glob('t.csv*')) == ['t.csv']


# ---------------------------------------------------------------- resuming

class Stopping:
    "Brightness; interrupted once, before the image number `after`."
    def __init__(self, after):
        self.after = after
        self.visited = []

    def __call__(self, path):
        if len(self.visited) == self.after:
            self.after = None
            raise KeyboardInterrupt
        self.visited.append(Path(path).name)
        return brightness(path)


def interrupted(folder, out, after=3, **kwargs):
    function = Stopping(after)
    with pytest.raises(KeyboardInterrupt): process_folder(folder, function, out, **kwargs)
    return function


@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_the_same_call_goes_on(folder, tmp_path, suffix):
    (folder/'torn.png').write_bytes(b'x')
    whole = process_folder(folder, brightness, tmp_path/f'whole{suffix}')
    out = tmp_path/f't{suffix}'
    function = interrupted(folder, out)
    assert not out.exists() and function.visited == ['a.jpg', 'b.png', 'c.TIF']
    again = process_folder(folder, function, out)
    assert function.visited[3:5] == ['d.bmp', 'e.png'] and 'a.jpg' not in function.visited[3:]
    pd.testing.assert_frame_equal(again.rows, whole.rows)
    pd.testing.assert_frame_equal(again.skipped, whole.skipped)
    assert out.read_bytes() == (tmp_path/f'whole{suffix}').read_bytes()
    assert not list(tmp_path.glob('*.jsonl'))


@pytest.mark.parametrize('keep', range(1, 60, 7))
def test_a_torn_line_is_done_again(folder, tmp_path, keep):
    out = tmp_path/'t.csv'
    function = interrupted(folder, out)
    part = tmp_path/'t.csv.part.jsonl'
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b''.join(lines[:2]) + lines[2][:keep])
    with pytest.raises(KeyboardInterrupt): # the line after the torn one is whole
        function.after = 4
        process_folder(folder, function, out)
    process_folder(folder, function, out)
    assert function.visited == ['a.jpg', 'b.png', 'c.TIF', 'c.TIF', 'd.bmp', 'e.png']
    assert pd.read_csv(out).path.tolist() == PATHS


def test_a_changed_image_is_done_again(folder, tmp_path):
    out = tmp_path/'t.csv'
    function = interrupted(folder, out)
    write_image(folder/'b.png', 99)
    os.utime(folder/'b.png', ns=(1, 1))
    rows = process_folder(folder, function, out).rows
    assert function.visited[3:] == ['b.png', 'd.bmp', 'e.png']
    assert rows.equals(process_folder(folder, brightness).rows)


def test_rows_of_another_fingerprint_do_not_mix(folder, tmp_path):
    out = tmp_path/'t.csv'
    interrupted(folder, out, fingerprint='one')
    other = Stopping(None)
    rows = process_folder(folder, other, out, fingerprint='two').rows
    assert len(other.visited) == 5 and len(rows) == 5


def test_numbers_survive_an_interruption_bit_by_bit(folder, tmp_path):
    numbers = dict(zip(('a.jpg', 'b.png', 'c.TIF', 'd.bmp', 'e.png'), (0.1 + 0.2, 1e-17, float('nan'), 2 / 3, 1e300)))

    def number(path):
        if path.endswith('e.png') and stop: raise KeyboardInterrupt
        return [dict(method='ä', predicted=numbers[Path(path).name], recommended=True)]

    stop = True
    with pytest.raises(KeyboardInterrupt): process_folder(folder, number, tmp_path/'t.csv')
    stop = False
    rows = process_folder(folder, number, tmp_path/'t.csv').rows
    assert np.array_equal(rows.predicted, list(numbers.values()), equal_nan=True)
    assert rows.recommended.dtype == bool and set(rows.method) == {'ä'}


SLOW = '''
import sys, time
from pathlib import Path
from rssqa.quality.folders import process_folder

def slow(path):
    while Path(sys.argv[3]).exists() and path.endswith('e.png'): time.sleep(0.05)
    return [dict(size=Path(path).stat().st_size)]

process_folder(sys.argv[1], slow, sys.argv[2], workers=int(sys.argv[4]))
'''


@pytest.mark.parametrize('signal_number', [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_run_goes_on(folder, tmp_path, signal_number):
    "While the last image is under way; a script without a main guard, as people write them."
    script, out, block = tmp_path/'slow.py', tmp_path/'t.csv', tmp_path/'block'
    script.write_text(SLOW)
    block.write_text('')
    command = [sys.executable, script, folder, out, block, '2']
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL) # where the tests run in the background
    options = dict(stderr=subprocess.PIPE, start_new_session=True, preexec_fn=listen)
    process = subprocess.Popen(command, **options)
    part = tmp_path/'t.csv.part.jsonl'
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b'\n') < 4): time.sleep(0.05)
    if signal_number == signal.SIGINT: os.killpg(process.pid, signal_number) # Ctrl-C reaches all processes
    else: process.kill()
    assert process.wait() == -signal_number and not out.exists()
    if signal_number == signal.SIGINT: assert process.stderr.read().count(b'Traceback') == 1
    assert part.read_bytes().count(b'"rows"') == 4
    block.unlink()
    subprocess.run(command, check=True)
    assert pd.read_csv(out)['size'].tolist() == [(folder/path).stat().st_size for path in PATHS]
    assert not part.exists()


# ---------------------------------------------------------------- workers

def test_a_process_that_is_ended_costs_only_its_image(folder):
    parent = os.getpid()

    def threads_or_end(path): # in a worker
        if path.endswith('b.png'): os.kill(os.getpid(), signal.SIGKILL)
        if path.endswith('e.png'): raise BadImage('cannot use e.png', 'found a test', 'go on')
        import torch
        return [dict(threads=torch.get_num_threads(), is_child=os.getpid() != parent)]

    rows, skipped, _ = process_folder(folder, threads_or_end, workers=2)
    assert rows.path.tolist() == ['a.jpg', 'deep/c.TIF', 'deep/d.bmp']
    assert (rows.threads == 1).all() and rows.is_child.all()
    assert skipped.path.tolist() == ['b.png', 'e.png']
    assert 'process that read it was ended' in skipped.reason[0] and 'found a test' in skipped.reason[1].lower()


def test_one_thread_in_this_process_too(folder):
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = process_folder(folder, lambda path: [dict(threads=torch.get_num_threads())], workers=1).rows
        assert (rows.threads == 1).all() and torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_processes_are_started_where_there_is_work_for_them(monkeypatch):
    monkeypatch.setattr('joblib.cpu_count', lambda: 8)
    started = []
    monkeypatch.setattr(module, '_from_processes', lambda function, paths, workers: started.append(workers))
    for images, asked in ((3, None), (31, None), (32, None), (800, None), (3, 2), (1, 2), (50, 1)):
        module._outcomes(brightness, ['a.png'] * images, asked)
    assert started == [2, 8, 2]


# ---------------------------------------------------------------- ranking a folder by a pack

@pytest.fixture(scope='module')
def pack(): return Pack(trained_setup().home)


def test_workers_and_interruptions_change_nothing(pack, folder, tmp_path, monkeypatch):
    (folder/'torn.png').write_bytes(b'x')
    one = rank_folder(folder, pack, out=tmp_path/'one.parquet', workers=1)
    two = rank_folder(folder, pack, out=tmp_path/'two.parquet', workers=2)
    pd.testing.assert_frame_equal(one.rows, two.rows)
    assert (tmp_path/'one.parquet').read_bytes() == (tmp_path/'two.parquet').read_bytes()
    pd.testing.assert_frame_equal(one.skipped, two.skipped)
    assert one.rows.path.unique().tolist() == PATHS and one.skipped.path.tolist() == ['torn.png']

    import rssqa.quality.recommend as recommending
    rank = recommending.rank
    ranked = []

    def rank_two(image, *args):
        if len(ranked) == 2: raise KeyboardInterrupt
        ranked.append(image)
        return rank(image, *args)

    monkeypatch.setattr(recommending, 'rank', rank_two)
    with pytest.raises(KeyboardInterrupt): rank_folder(folder, pack, out=tmp_path/'three.parquet')
    monkeypatch.setattr(recommending, 'rank', rank)
    rows, _ = recommend(folder, pack, out=tmp_path/'three.parquet')
    pd.testing.assert_frame_equal(rows, one.rows)
    assert (tmp_path/'three.parquet').read_bytes() == (tmp_path/'one.parquet').read_bytes()


def test_a_fingerprint_of_everything_that_a_ranking_depends_on(pack, tmp_path):
    first = pack.fingerprint()
    assert first == Pack(pack.folder).fingerprint('synth_town')
    from shutil import copytree, ignore_patterns
    home = copytree(pack.folder, tmp_path/'pack', ignore=ignore_patterns('store', 'town'))
    assert Pack(home).fingerprint() == first
    weights = home/Pack(home).config['networks']['synth_town']['pspnet']/'config.json'
    weights.write_text(weights.read_text() + ' ')
    assert Pack(home).fingerprint() != first
    assert Pack(pack.folder).add('own', pack.segmenter('pspnet')).fingerprint() != first
    (home/'assessor').mkdir()
    config = read_json(home/'pack.json')
    write_json(home/'pack.json', config | dict(assessor='assessor'))
    without = Pack(home).fingerprint()
    (home/'assessor'/'assessor.safetensors').write_bytes(b'weights')
    assert Pack(home).fingerprint() != without


def test_a_pack_that_lacks_a_network_fails_before_the_first_image(pack, folder, tmp_path, monkeypatch):
    import rssqa.quality.recommend as recommending
    monkeypatch.setattr(recommending, 'process_folder', lambda *args: pytest.fail('an image was read'))
    broken = Pack(pack.folder)
    broken.config = broken.config | dict(networks=dict(synth_town=dict(pspnet='nowhere')))
    with pytest.raises(DataNotFound, match='nowhere'): rank_folder(folder, broken)


# ---------------------------------------------------------------- the command line

def call(capsys, *args): # -> exit code, stdout, stderr
    with pytest.raises(SystemExit) as stop: main(list(map(str, args)))
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_a_program_reads_one_document(pack, folder, tmp_path, capsys):
    (folder/'torn.png').write_bytes(b'x')
    out = tmp_path/'t.csv'
    code, printed, _ = call(capsys, 'recommend', folder, '-o', out, '--json', '--pack', pack.folder)
    document = json.loads(printed)
    assert code == 0 and list(document) == ['pack', 'images', 'skipped'] and document['pack'] == pack.name
    assert [image['path'] for image in document['images']] == PATHS
    table = pd.read_csv(out)
    best = table[table.recommended].set_index('path').method
    for image in document['images']:
        assert image['recommended'] == best[image['path']] == image['methods'][0]['name']
        assert sorted(method['name'] for method in image['methods']) == METHODS
        assert all(0 < method['predicted'] < 1 for method in image['methods'])
    assert [entry['path'] for entry in document['skipped']] == ['torn.png'] and document['skipped'][0]['reason']


def test_a_folder_without_a_usable_image_ends_with_code_2_and_its_reasons(pack, tmp_path, capsys):
    for name in ('a.png', 'b.jpg', 'c.txt'): (tmp_path/name).write_bytes(b'x')
    args = ('recommend', tmp_path, '-o', tmp_path/'t.csv', '--pack', pack.folder)
    code, printed, err = call(capsys, *args)
    assert code == 2 and 'skipped a.png' in printed and 'skipped b.jpg' in printed and 'all 2 failed' in err.lower()
    assert '2 skipped, 1 files of other kinds' in printed and not (tmp_path/'t.csv').exists()
    code, printed, err = call(capsys, *args, '--json')
    assert code == 2 and json.loads(printed)['images'] == [] and len(json.loads(printed)['skipped']) == 2


def test_the_summary_counts_images_and_skipped_files(pack, folder, tmp_path, capsys):
    (folder/'torn.png').write_bytes(b'x')
    (folder/'notes.txt').write_text('windy')
    args = ('--workers', 1, '--pack', pack.folder)
    code, printed, _ = call(capsys, 'recommend', folder, '-o', tmp_path/'t.parquet', *args)
    assert code == 0 and printed.startswith('5 images, 2 methods -> ')
    assert '1 skipped, 1 files of other kinds' in printed and 'skipped torn.png' in printed
    code, _, err = call(capsys, 'recommend', folder, '-o', tmp_path/'t.xlsx', '--pack', 'nowhere')
    assert code == 2 and 't.xlsx' in err
