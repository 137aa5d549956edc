"""One thread, one cache, no network, no noise; opt-in work by flag: `pytest --nb-flags "slow real"`."""
import os, shutil, sys, tempfile
from functools import cache
from pathlib import Path

import pytest

FLAGS = {
    'slow': 'takes minutes',
    'gpu': 'needs an accelerator',
    'weights': 'needs downloaded weights',
    'real': 'needs real imagery below RSSQA_REAL',
}
FIRST = 'RSSQA_TEST_RUN' not in os.environ       # not a worker or a fork of a run that is under way


def prepare_environment():
    "Set what numpy, torch, numba and matplotlib read at their first import; subprocesses and workers inherit it."
    os.environ |= dict(
        OMP_NUM_THREADS='1',
        OPENBLAS_NUM_THREADS='1',
        MKL_NUM_THREADS='1',
        NUMBA_THREADING_LAYER='workqueue',
        MPLBACKEND='agg',
        RSSQA_QUIET='1',
        ARROW_DEFAULT_MEMORY_POOL='system',  # jemalloc's thread can hang a worker that exits
        TQDM_DISABLE='1',
        PYDEVD_DISABLE_FILE_VALIDATION='1',
    )
    os.environ.setdefault('RSSQA_DEVICE', 'cpu')
    os.environ.pop('IN_TEST', None)                      # with it nbdev_export does nothing
    run = Path(tempfile.mkdtemp(prefix='rssqa-test-'))   # one folder for all workers of this run
    os.environ |= dict(
        RSSQA_TEST_RUN=str(run),
        RSSQA_CACHE=os.environ.get('RSSQA_TEST_CACHE') or str(run / 'cache'),
        IPYTHONDIR=str(run / 'ipython'),
    )
    if sys.dont_write_bytecode: keep_compiled_files(run/'compiled')


def keep_compiled_files(folder):
    "Keep compiled modules for this run: else each process compiles torch, pandas and the others anew, for seconds."
    os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
    os.environ['PYTHONPYCACHEPREFIX'] = sys.pycache_prefix = str(folder)
    sys.dont_write_bytecode = False


if FIRST: prepare_environment()


def pytest_addoption(parser):
    parser.addoption('--nb-flags', default='', help=f'opt-in cells and tests to run, of: {" ".join(FLAGS)}')


def asked_flags(config) -> set:
    "Return the opt-in flags of this run; `real` is on wherever RSSQA_REAL is set."
    flags = set(config.getoption('--nb-flags').split())
    if unknown := flags - FLAGS.keys():
        raise pytest.UsageError(f'--nb-flags: no {", ".join(sorted(unknown))}; choose from {" ".join(FLAGS)}')
    return flags | ({'real'} if os.environ.get('RSSQA_REAL') else set())


def pytest_configure(config):
    flags = asked_flags(config)
    if 'weights' not in flags: os.environ['HF_HUB_OFFLINE'] = '1'
    for flag, why in FLAGS.items():
        config.addinivalue_line('markers', f'{flag}: {why}; runs with --nb-flags {flag}')


def pytest_unconfigure(config):
    if FIRST: shutil.rmtree(os.environ['RSSQA_TEST_RUN'], ignore_errors=True)


@cache
def shares_fixtures(path) -> bool:
    "Tell whether tests of a file share something that is made once."
    return "scope='module'" in path.read_text(encoding='utf-8')


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Give a file whose tests share something to one worker, and each other test to whichever is free."
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split('::')[0]
            return file if shares_fixtures(config.rootpath/file) else nodeid

    return Scheduler(config, log)


def pytest_collection_modifyitems(config, items):
    off = FLAGS.keys() - asked_flags(config)
    for item in items:
        for mark in item.iter_markers():
            if mark.name in off:
                item.add_marker(
                    pytest.mark.skip(reason=f'{FLAGS[mark.name]}; ask with --nb-flags {mark.name}')
                )


@pytest.fixture(scope='session')
def nb_flags(request) -> set: return asked_flags(request.config)


@pytest.fixture
def real() -> Path:
    "The folder of real imagery; skips the test where there is none."
    if not os.environ.get('RSSQA_REAL'): pytest.skip('RSSQA_REAL is unset')
    return Path(os.environ['RSSQA_REAL'])
