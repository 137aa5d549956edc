"""The names a notebook wants: `from rssqa.all import *`. Hand-written; loads torch, but neither open_clip, umap nor matplotlib."""
from .quality.baselines import BlockBaseline, ColumnBaseline, MeanBaseline, baselines
from .bench.protocol import bootstrap, by_group, compare, leaderboard, comparison_summary
from .clip.evaluate import evaluate_clip, retrieval, zero_shot
from .clip.train import ClipRecipe, PairViews, new_clip, save_clip, train_clip
from .quality.intervals import Intervals, coverage, cross_intervals
from .core import as_image, datasets, encoders, fusions, segmenters
from .data.datasets import DatasetSpec, folder_spec, make_spec, read_image, read_mask, scan, tile
from .data.splits import folds, split_by_scene
from .clip.encoders import EncoderSpec, check_encoder, load_encoder
from .quality.fusion import CrossGating, check_fusion
from .quality.consensus import ConsensusModel, LevelPooledEnsemble
from .segment.metrics import accuracy, confusion, evaluate, recommendation, single_best
from .segment.methods.training import Recipe, cross_fit, load_segmenter, train
from .data.pairs import PairRecord, open_image, read_pairs, to_frame, write_shards
from .clip.purify import apply_decisions, purify
from .viz.projection import Projection, neighbour_graph, project, separation, stages
from .quality.model import QualityModel, explain, load_model, save_model
from .quality.assessor import Assessor, TrainingImage
from .quality.pack import Pack, use_pack
from .quality.recommend import assess, rank, recommend, score
from .scene.assess_scene import SceneAssessment, assess_scene
from .segment.protocol import METHOD_NAMES, MethodSpec, Segmenter, SegOutput, TorchSegmenter, check_segmenter, methods, predict_large
from .tables.sqed import build_sqed, check_sqed, load_sqed, save_sqed
from .tables.store import Store, extract
from .data.synthetic import KINDS, SCENE_TYPES, degrade, scene, write_scenes
from .viz.figures import compare_branches, plot_embedding, plot_methods, plot_predicted_true, plot_recommendation

__all__ = [name for name in globals() if not name.startswith('_') and name != 'annotations']
