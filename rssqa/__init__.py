"""How accurate is a segmentation of an image from above, without labels, and which method should be used?"""
__version__ = "0.1.0"

_HOME = dict(
    assess='quality.recommend',
    Assessor='quality.assessor',
    assess_scene='scene.assess_scene',
    score='quality.recommend',
    rank='quality.recommend',
    Pack='quality.pack',
    QualityModel='quality.model',
    ConsensusModel='quality.consensus',
    LevelPooledEnsemble='quality.consensus',
    Intervals='quality.intervals',
    load_model='quality.model',
    build_sqed='tables.sqed',
    load_sqed='tables.sqed',
    check_sqed='tables.sqed',
    scan='data.datasets',
    folder_spec='data.datasets',
    load_encoder='clip.encoders',
    Segmenter='segment.protocol',
    Store='tables.store',
)


def __getattr__(name):
    "Import the facade on first use, so that `import rssqa` stays instant."
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import importlib
    return getattr(importlib.import_module(f'.{_HOME[name]}', __name__), name)


def __dir__(): return sorted([*globals(), *_HOME])
