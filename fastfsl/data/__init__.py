"""Data sets: image folders, split files, feature files, few-shot episodes, prompt templates. Never imports torch."""

from fastfsl.data.class_split import ClassSelection, select_classes
from fastfsl.data.dataset import SPLITS, FeatureDataset, ImageDataset, ImageSample
from fastfsl.data.episode import Episode, draw_episode, sample_episode
from fastfsl.data.feature_file import read_feature_file, write_feature_file
from fastfsl.data.folder import read_folder
from fastfsl.data.load import load_dataset
from fastfsl.data.presets import PRESETS, class_prompts, prompt_names
from fastfsl.data.prompts import TEMPLATES, clean_class_name, fill, resolve_templates
from fastfsl.data.readable import check_readable
from fastfsl.data.skipped import Skipped, file_account
from fastfsl.data.split_file import read_split_file
from fastfsl.data.table import read_table
from fastfsl.data.table_columns import Columns

__all__ = [
    "PRESETS",
    "SPLITS",
    "TEMPLATES",
    "ClassSelection",
    "Columns",
    "Episode",
    "FeatureDataset",
    "ImageDataset",
    "ImageSample",
    "Skipped",
    "check_readable",
    "class_prompts",
    "clean_class_name",
    "draw_episode",
    "file_account",
    "fill",
    "load_dataset",
    "prompt_names",
    "read_feature_file",
    "read_folder",
    "read_split_file",
    "read_table",
    "resolve_templates",
    "sample_episode",
    "select_classes",
    "write_feature_file",
]
