"""The names a notebook wants: `from rssqa.all import *`. Hand-written; loads torch, but neither open_clip, umap nor matplotlib."""
from .baselines import BlockBaseline, ColumnBaseline, MeanBaseline, baselines
from .bench import bootstrap, by_group, compare, leaderboard, verdict
from .clipeval import evaluate_clip, retrieval, zero_shot
from .cliptrain import ClipRecipe, PairViews, new_clip, save_clip, train_clip
from .conformal import Intervals, coverage, cross_intervals
from .core import as_image, datasets, encoders, fusions, segmenters
from .data import DatasetSpec, folder_spec, folds, make_spec, read_image, read_mask, scan, split_by_scene, tile
from .encoders import EncoderSpec, check_encoder, load_encoder
from .fusion import CrossGating, check_fusion
from .jury import JuryModel, Panel
from .metrics import accuracy, confusion, evaluate, recommendation, single_best
from .methods.training import Recipe, cross_fit, load_segmenter, train
from .pairs import PairRecord, open_image, read_pairs, to_frame, write_shards
from .purify import apply_decisions, purify
from .projection import Projection, neighbour_graph, project, separation, stages
from .quality import QualityModel, explain, load_model, save_model
from .recommend import Pack, rank, recommend, score
from .segment import EIGHT, MethodSpec, Segmenter, SegOutput, TorchSegmenter, check_segmenter, methods, predict_large
from .sqed import build_sqed, check_sqed, load_sqed, save_sqed
from .store import Store, extract
from .synth import KINDS, LOOKS, degrade, scene, write_scenes
from .viz import compare_branches, plot_embedding, plot_methods, plot_predicted_true, plot_recommendation

__all__ = [name for name in globals() if not name.startswith('_') and name != 'annotations']
