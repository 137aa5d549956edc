"""A pack on the Hugging Face hub, spoken to by the real client through a small hub on this machine."""
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from rssqa.core import DataNotFound
from rssqa.quality.pack import HUB_FILES, Pack, fetch_pack
from test_degradation import small_pack

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Hub(BaseHTTPRequestHandler):
    "What snapshot_download asks a hub for: the list of files of a revision, and each file."
    def log_message(self, *_): pass

    def answer(self, status, body=b'', **headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        files = self.server.files
        if self.path.startswith('/api/models/me/pack/revision/'):
            siblings = [dict(rfilename=name) for name in files]
            facts = dict(id='me/pack', modelId='me/pack', sha=COMMIT, siblings=siblings, private=False, tags=[])
            self.answer(200, json.dumps(facts).encode(), Content_Type='application/json')
            return
        if self.path.startswith('/api/models/me/pack/tree/'):
            tree = [dict(type='file', path=name, size=path.stat().st_size, oid=name) for name, path in files.items()]
            self.answer(200, json.dumps(tree).encode(), Content_Type='application/json')
            return
        place = f'/me/pack/resolve/{COMMIT}/'
        name = self.path.removeprefix(place)
        if not self.path.startswith(place) or name not in files:
            self.answer(404, X_Error_Code='RepoNotFound', X_Error_Message='Repository not found')
            return
        body = files[name].read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Content_Type='application/octet-stream')


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hub')
    (folder/'evil.py').write_text('print("never run")')
    (folder/'weights.bin').write_bytes(b'never read')
    files = {path.relative_to(small_pack()).as_posix(): path for path in small_pack().rglob('*') if path.is_file()}
    files |= {path.name: path for path in folder.iterdir()}
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.files, server.asked = files, []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def rssqa(hub, home, *args, **more): # in a process of its own: the client reads its settings once
    env = os.environ | dict(
        HF_ENDPOINT=f'http://127.0.0.1:{hub.server_address[1]}', HF_HOME=str(home), HF_HUB_DISABLE_XET='1',
        HF_HUB_OFFLINE='0', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1',
    ) | more
    code = 'import sys; from rssqa.cli import main; main(sys.argv[1:])'
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, env=env, timeout=120)


def test_a_pack_of_the_hub_answers(hub, tmp_path):
    first = rssqa(hub, tmp_path, 'pack', 'show', '--pack', 'hf:me/pack')
    local = rssqa(hub, tmp_path, 'pack', 'show', '--pack', str(small_pack()))
    assert first.returncode == local.returncode == 0, (first.stderr, hub.asked)
    assert first.stdout.startswith('Pack hf:me/pack: synthetic (2 methods)')
    assert local.stdout.startswith('Pack two-networks: synthetic (2 methods)')
    kept = {path.name for path in tmp_path.rglob('*') if path.is_file() and 'snapshots' in path.parts}
    assert 'pack.json' in kept and not kept & {'evil.py', 'weights.bin'}
    # files come from the cache when the network is gone
    again = rssqa(hub, tmp_path, 'pack', 'show', '--pack', 'hf:me/pack', HF_HUB_OFFLINE='1')
    assert again.returncode == 0 and again.stdout == first.stdout


def test_what_is_not_there_is_named(hub, tmp_path):
    gone = rssqa(hub, tmp_path, 'pack', 'show', '--pack', 'hf:me/other')
    assert gone.returncode and 'cannot fetch the pack hf:me/other' in gone.stderr and 'hf auth login' in gone.stderr
    assert 'Traceback' not in gone.stderr
    wrong = rssqa(hub, tmp_path, 'pack', 'show', '--pack', 'hf:a/b/c')
    assert wrong.returncode and 'cannot fetch the pack hf:a/b/c' in wrong.stderr


def test_revisions_reach_the_hub(monkeypatch):
    asked = []
    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(small_pack())
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    assert fetch_pack('hf:me/pack@v2') == Path(small_pack()) and Pack('hf:me/pack').folder == Path(small_pack())
    assert asked == [('me/pack', 'v2', HUB_FILES), ('me/pack', None, HUB_FILES)]
    with pytest.raises(DataNotFound, match='(?i)no pack in'): Pack('me/pack')
