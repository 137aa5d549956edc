"Record the digest of each committed weight file in the JSON file beside it: `tools/digests.py [--check]`."
import sys
from pathlib import Path

from rssqa.core import read_json, weight_digests, write_json

MODELS = Path(__file__).parents[1]/'data/models'


def weight_files(config): # names of the weight files that a JSON file describes, [] where it describes none
    if config.get('kind') == 'ConsensusEnsemble': return ['consensus.safetensors']
    if 'fingerprint' in config: return [config.get('weights', 'model.safetensors'), 'reference.safetensors']
    return []


def record(path, check): # -> whether the JSON file was current
    config = read_json(path)
    names = weight_files(config)
    if not names: return True
    digests = weight_digests(path.parent, *names)
    is_current = config.get('digests') == digests
    if not check and not is_current: write_json(path, config | dict(digests=digests))
    return is_current


def main(check, models=MODELS):
    paths = [*models.rglob('config.json'), *models.rglob('consensus.json')]
    old = [path.relative_to(models) for path in sorted(paths) if not record(path, check)]
    for path in old: print(f'{path}: {"digests are not current" if check else "digests written"}')
    return bool(old) and check


if __name__ == '__main__': sys.exit(main('--check' in sys.argv))
