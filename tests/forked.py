"""Run a function in a fresh process that has the heavy libraries loaded already.

A server process imports them once and does nothing else, so that its forks start clean:
no threads, no CUDA, no state of other tests.
"""
import contextlib, multiprocessing, os, sys, tempfile, traceback
from pathlib import Path

HEAVY = [
    'torch',
    'torch._dynamo',                # what the first optimizer of a process imports
    'torchvision',
    'pandas',
    'matplotlib.pyplot',
    'matplotlib_inline.backend_inline',
    'timm',
    'open_clip',
    'scipy.stats',
    'sklearn.linear_model',
    'PIL.Image',
    'pytest',
    'nbformat',
    'yaml',
    'pypandoc',
    'nbdev.test',
    'nbdev.showdoc',
    'nbdev.serve_drv',
    'execnb.shell',
]
METHOD = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
context = multiprocessing.get_context(METHOD)
if METHOD == 'forkserver': context.set_forkserver_preload(HEAVY)


def _child(log, function, args):
    with open(log, 'w', encoding='utf-8') as out:
        for fd in 1, 2: os.dup2(out.fileno(), fd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try: function(*args)
            except BaseException:
                traceback.print_exc()
                out.flush()
                sys.exit(1)


def run_forked(function, *args, limit_s=600, tail=60) -> str:
    "Call `function(*args)` in a fork; return why it failed (its last lines of output), or an empty string."
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)/'log'
        process = context.Process(target=_child, args=(log, function, args))
        process.start()
        process.join(limit_s)
        late = process.is_alive()
        if late:
            process.terminate()
            process.join(5)
            process.kill()
            process.join()
        if process.exitcode == 0 and not late: return ''
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines() if log.exists() else []
        why = f'not done after {limit_s} s' if late else f'exit code {process.exitcode}'
        return '\n'.join([*lines[-tail:], f'{function.__name__}: {why}'])
