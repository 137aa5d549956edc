"""How accurate is a segmentation of an image from above, without labels, and which method should be used?"""
__version__ = "0.1.0"

_HOME = dict(score='recommend', rank='recommend', Pack='recommend', QualityModel='quality', JuryModel='jury', Panel='jury', Intervals='conformal', load_model='quality', build_sqed='sqed',
             load_sqed='sqed', check_sqed='sqed', scan='data', folder_spec='data', load_encoder='encoders', Segmenter='segment', Store='store')


def __getattr__(name):
    "Import the facade on first use, so that `import rssqa` stays instant."
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import importlib
    return getattr(importlib.import_module(f'.{_HOME[name]}', __name__), name)


def __dir__(): return sorted([*globals(), *_HOME])
