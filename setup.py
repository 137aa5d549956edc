"""Hand settings.ini, the single home of rssqa's metadata, to setuptools."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {key.removesuffix('_requirements'): shlex.split(value)
          for key, value in cfg.items() if key.endswith('_requirements')}

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
      long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      license='Apache-2.0', author=cfg['author'], author_email=cfg['author_email'],
      project_urls={'Source': cfg['git_url'], 'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
      packages=[*find_packages(include=['rssqa*']), 'rssqa.models', 'rssqa.apps'],
      package_dir={'rssqa.models': 'data/models', 'rssqa.apps': 'nbs/apps'},
      package_data={'rssqa': ['py.typed'], 'rssqa.apps': ['*.ipynb'],
                    'rssqa.models': ['**/*.json', '**/*.safetensors', '**/*.parquet']},
      install_requires=shlex.split(cfg['requirements']), extras_require=extras,
      entry_points={'console_scripts': cfg['console_scripts'].split('\n'), 'nbdev': ['rssqa=rssqa._modidx:d']})
