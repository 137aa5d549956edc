"""Downloads from a local server: interruption, resume, wrong checksum, servers with faults; malicious archives."""
import hashlib, http.server, io, stat, tarfile, threading, zipfile
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rssqa.data import download
from rssqa.core import DownloadError, UnknownName, datasets, read_json
from rssqa.data.datasets import Archive, scan
from rssqa.data.download import fetch, get, require_space, unpack
from rssqa.testing.fake_datasets import fake_dataset

DATA = np.random.default_rng(0).bytes(50_000)
MD5 = 'md5:' + hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch): monkeypatch.setenv('no_proxy', '*')


class Site(http.server.BaseHTTPRequestHandler):
    "Serve one file; attributes of the server object decide which faults it has."
    def log_message(self, *args): pass

    def do_GET(self):
        server = self.server
        wanted = self.headers.get('Range')
        server.requests.append(wanted)
        if server.status and len(server.requests) <= server.status_times: return self.send_error(server.status)
        in_ranges = wanted and server.ranges
        start = int(wanted[6:-1]) if in_ranges else 0
        size = len(server.data)
        if start >= size > 0:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{size}')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        body = server.data[start:]
        self.send_response(206 if in_ranges else 200)
        if in_ranges: self.send_header('Content-Range', f'bytes {start + server.shift}-{size - 1}/{size}')
        if server.length: self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(body[:cut])
        if cut is not None: self.connection.close()


@contextmanager
def site(data=DATA, **faults):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Site)
    defaults = dict(requests=[], cuts=[], ranges=True, length=True, status=0, status_times=99, shift=0)
    server.__dict__ |= dict(data=data) | defaults | faults
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try: yield server, f'http://127.0.0.1:{server.server_port}/some/file.zip'
    finally:
        server.shutdown()
        server.server_close()


def message(e):
    assert '\n' not in str(e.value) and e.value.what and e.value.found and e.value.todo
    return str(e.value)


# ---- transfers

def test_plain_download_and_no_second_one(tmp_path):
    with site() as (server, url):
        path = fetch(url, tmp_path/'deep/er/f.zip', MD5)
        assert path.read_bytes() == DATA and server.requests == [None]
        fetch(url, path, MD5)
        assert len(server.requests) == 1 and [p.name for p in path.parent.iterdir()] == ['f.zip']


@pytest.mark.parametrize('checksum', [MD5, 'sha256:' + hashlib.sha256(DATA).hexdigest(), ''])
def test_interrupted_transfer_resumes_where_it_stopped(tmp_path, checksum):
    with site(cuts=[20_000, 10_000]) as (server, url):
        assert fetch(url, tmp_path/'f', checksum, pause=0).read_bytes() == DATA
    assert server.requests == [None, 'bytes=20000-', 'bytes=30000-']


def test_a_later_run_resumes_too(tmp_path):
    with site(cuts=[20_000, 0]) as (server, url):
        with pytest.raises(DownloadError) as e: fetch(url, tmp_path/'f', MD5, attempts=2, pause=0)
        assert '20000 bytes are kept' in message(e) and not (tmp_path/'f').exists()
        assert fetch(url, tmp_path/'f', MD5).read_bytes() == DATA
    assert server.requests == [None, 'bytes=20000-', 'bytes=20000-']


def test_server_that_ignores_range_starts_anew(tmp_path):
    with site(ranges=False, cuts=[20_000]) as (server, url):
        assert fetch(url, tmp_path/'f', MD5, pause=0).read_bytes() == DATA
    assert server.requests == [None, 'bytes=20000-']


def test_another_range_than_the_wanted_one_is_not_used(tmp_path):
    (tmp_path/'f.part').write_bytes(DATA[:1000])
    with site(shift=5) as (server, url): assert fetch(url, tmp_path/'f', MD5, pause=0).read_bytes() == DATA
    assert server.requests == ['bytes=1000-', None]


def test_complete_part_is_finished_without_a_transfer(tmp_path):
    (tmp_path/'f.part').write_bytes(DATA)
    with site() as (server, url): assert fetch(url, tmp_path/'f', MD5).read_bytes() == DATA
    assert server.requests == [f'bytes={len(DATA)}-']


def test_part_longer_than_the_file_starts_anew(tmp_path):
    (tmp_path/'f.part').write_bytes(DATA + b'more')
    with site() as (server, url): assert fetch(url, tmp_path/'f', MD5).read_bytes() == DATA


def test_wrong_checksum_is_removed_and_named(tmp_path):
    with site(data=b'something else') as (server, url):
        with pytest.raises(DownloadError) as e: fetch(url, tmp_path/'f', MD5)
    assert MD5 in message(e) and list(tmp_path.iterdir()) == []


def test_damaged_part_is_found_by_the_checksum_and_the_next_run_is_clean(tmp_path):
    (tmp_path/'f.part').write_bytes(b'x' * 1000)
    with site() as (server, url):
        with pytest.raises(DownloadError): fetch(url, tmp_path/'f', MD5)
        assert fetch(url, tmp_path/'f', MD5).read_bytes() == DATA


def test_wrong_file_in_place_is_replaced(tmp_path):
    (tmp_path/'f').write_bytes(b'old')
    with site() as (server, url): assert fetch(url, tmp_path/'f', MD5).read_bytes() == DATA


def test_404_is_final_and_503_is_tried_again(tmp_path):
    with site(status=404) as (server, url):
        with pytest.raises(DownloadError) as e: fetch(url, tmp_path/'f', MD5, pause=0)
        assert '404' in message(e) and len(server.requests) == 1
    with site(status=503, status_times=2) as (server, url):
        assert fetch(url, tmp_path/'f', MD5, pause=0).read_bytes() == DATA and len(server.requests) == 3


def test_no_server(tmp_path):
    with site() as (server, url): pass
    with pytest.raises(DownloadError) as e: fetch(url, tmp_path/'f', attempts=2, pause=0)
    assert 'roken off 2 times' in message(e)


def test_server_without_length(tmp_path):
    with site(length=False) as (server, url): assert fetch(url, tmp_path/'f', MD5).read_bytes() == DATA


@pytest.mark.parametrize('url', ['file:///etc/hostname', 'ftp://x/y', 'nonsense'])
def test_only_the_web(tmp_path, url):
    with pytest.raises(DownloadError, match='http'): fetch(url, tmp_path/'f')


def test_full_disk_is_reported_before_the_transfer(tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda p: SimpleNamespace(free=40_000))
    with site() as (server, url):
        with pytest.raises(DownloadError) as e: fetch(url, tmp_path/'f', MD5, pause=0)
        assert 'no space' in message(e) and len(server.requests) == 1
        # bytes that are there already need no space
        (tmp_path/'f.part').write_bytes(DATA[:20_000])
        assert fetch(url, tmp_path/'f', MD5).read_bytes() == DATA
    with pytest.raises(DownloadError): require_space(tmp_path, 40_001, 'x')


# ---- archives

def zipped(path, *names, **special):
    with zipfile.ZipFile(path, 'w') as z:
        for n in names: z.writestr(n, 'content')
        for n, mode in special.items(): z.writestr(_mode_info(n, mode), '/etc/passwd')
    return path


def _mode_info(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def tarred(path, *members, mode='w:gz'):
    with tarfile.open(path, mode) as t:
        for m in members:
            info = m if isinstance(m, tarfile.TarInfo) else tarfile.TarInfo(m)
            if info.isreg(): info.size = 7
            t.addfile(info, io.BytesIO(b'content') if info.isreg() else None)
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


@pytest.mark.parametrize('suffix', ['zip', 'tar.gz', 'tar', 'tar.xz'])
def test_good_archives(tmp_path, suffix):
    path = tmp_path/f'a.{suffix}'
    names = ('Train/Urban/1.png', './Train/2 ö.png', 'a..b/c.txt')
    mode = {'tar': 'w', 'tar.gz': 'w:gz', 'tar.xz': 'w:xz'}.get(suffix)
    out = unpack(tarred(path, *names, mode=mode) if mode else zipped(path, *names), tmp_path/'out')
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file())
    assert files == ['Train/2 ö.png', 'Train/Urban/1.png', 'a..b/c.txt']
    assert (out/'Train/Urban/1.png').read_text() == 'content'


OUTSIDE = ['../evil', 'a/../../evil', '/var/rssqa-evil', 'a/..']
OUTSIDE_ON_WINDOWS = ['..\\evil', 'C:\\evil', 'C:evil', '\\\\host\\evil']


@pytest.mark.parametrize('name', OUTSIDE + OUTSIDE_ON_WINDOWS)
@pytest.mark.parametrize('pack', [zipped, tarred])
def test_names_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path, pack, name):
    with pytest.raises(DownloadError) as e: unpack(pack(tmp_path/'bad', 'fine.txt', name), tmp_path/'out')
    assert 'bad' in message(e) and list((tmp_path/'out').iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad', 'out']


@pytest.mark.parametrize('member', [
    link('l', '/etc/passwd'),
    link('l', '../..'),
    link('l', 'fine.txt'),
    link('l', '/etc/passwd', tarfile.LNKTYPE),
    link('p', '', tarfile.FIFOTYPE),
    link('d', '', tarfile.CHRTYPE),
])
def test_links_and_devices_are_refused(tmp_path, member):
    with pytest.raises(DownloadError):
        unpack(tarred(tmp_path/'bad.tar', 'fine.txt', member, mode='w'), tmp_path/'out')
    assert list((tmp_path/'out').iterdir()) == []


def test_links_in_zip_are_refused(tmp_path):
    with pytest.raises(DownloadError):
        unpack(zipped(tmp_path/'bad.zip', 'fine.txt', evil=stat.S_IFLNK | 0o777), tmp_path/'out')
    assert list((tmp_path/'out').iterdir()) == []


def test_a_link_that_is_there_already_does_not_lead_out(tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'out/sub').symlink_to(tmp_path/'elsewhere')
    with pytest.raises(DownloadError): unpack(zipped(tmp_path/'a.zip', 'sub/x.txt'), tmp_path/'out')
    assert list((tmp_path/'elsewhere').iterdir()) == []


def test_damaged_archives_are_named(tmp_path):
    good = zipped(tmp_path/'a.zip', *[f'{i}.txt' for i in range(50)]).read_bytes()
    for content in (b'', b'<html>', good[:len(good) // 2], good.replace(b'content', b'CONTENT', 1)):
        (tmp_path/'a.zip').write_bytes(content)
        with pytest.raises(DownloadError) as e: unpack(tmp_path/'a.zip', tmp_path/'out')
        assert 'a.zip' in message(e)
    whole = tarred(tmp_path/'a.tgz', *'abcdef').read_bytes()
    (tmp_path/'a.tgz').write_bytes(whole[:len(whole) - 20])
    with pytest.raises(DownloadError, match='a.tgz'): unpack(tmp_path/'a.tgz', tmp_path/'out')


def test_an_archive_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda p: SimpleNamespace(free=10))
    with pytest.raises(DownloadError, match='no space'):
        unpack(zipped(tmp_path/'a.zip', 'a', 'b'), tmp_path/'out')
    assert list((tmp_path/'out').iterdir()) == []


# ---- whole datasets

@pytest.fixture
def packed(tmp_path):
    "A fake LoveDA as a zip, and its description with the address left open."
    fake_dataset('loveda', tmp_path/'src')
    with zipfile.ZipFile(tmp_path/'all.zip', 'w') as z:
        for p in sorted((tmp_path/'src').rglob('*.png')): z.write(p, p.relative_to(tmp_path/'src'))
    return (tmp_path/'all.zip').read_bytes()


def test_get_fetches_unpacks_and_is_done(tmp_path, packed, capsys):
    checksum = 'md5:' + hashlib.md5(packed).hexdigest()
    with site(data=packed, cuts=[5000]) as (server, url):
        archive = Archive(url, checksum, len(packed))
        datasets.register('tiny', replace(datasets['loveda'], name='tiny', downloads=(archive,)))
        try:
            root = get('tiny', tmp_path/'got')
            assert len(scan(root, 'tiny')) == 12 and 'CC BY-NC-SA' in capsys.readouterr().out
            assert not list(root.glob('*.zip')) and read_json(root/'.rssqa.json') == {'file.zip': checksum}
            n_requests = len(server.requests)
            get('tiny', root)
            assert len(server.requests) == n_requests
        finally: del datasets.entries['tiny']


def test_get_prints_terms_and_steps_where_nothing_may_be_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, 'fetch', lambda *a: pytest.fail('nothing may be fetched'))
    for name in ('vaihingen', 'potsdam', 'uavid', 'floodnet'):
        assert not get(name, tmp_path/name).exists()
        out = capsys.readouterr().out
        spec = datasets[name]
        assert spec.licence in out and spec.homepage in out and spec.manual in out
    with pytest.raises(UnknownName): get('vaihigen', tmp_path)


def test_official_downloads_have_checksums():
    for name in ('vaihingen', 'potsdam', 'loveda', 'uavid', 'floodnet'):
        for a in datasets[name].downloads:
            assert a.url.startswith('https://') and len(a.checksum) == len('md5:') + 32
    names = [a.url.split('/')[-1] for a in datasets['loveda'].downloads]
    assert names == ['Train.zip', 'Val.zip', 'Test.zip']
