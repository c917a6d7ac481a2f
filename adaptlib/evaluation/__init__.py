"""Evaluation: how well a model, with or without experts, does a task."""

from adaptlib.evaluation.merge_data import merge_data
from adaptlib.evaluation.score import Score, exact_match, label_accuracy

__all__ = ["Score", "exact_match", "label_accuracy", "merge_data"]
