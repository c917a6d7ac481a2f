"""Evaluation: how well a model, with or without experts, does a task.

A new metric is a function and a line in METRICS.
"""

from adaptlib.evaluation.answers import Limits
from adaptlib.evaluation.cache import Cache
from adaptlib.evaluation.evaluate import Result, Subject, evaluate, evaluate_all
from adaptlib.evaluation.merge_data import merge_data
from adaptlib.evaluation.metrics import METRICS, Metric
from adaptlib.evaluation.score import Score, exact_match, label_accuracy
from adaptlib.evaluation.statistics import Paired, interval, paired

__all__ = [
    "METRICS",
    "Cache",
    "Limits",
    "Metric",
    "Paired",
    "Result",
    "Score",
    "Subject",
    "evaluate",
    "evaluate_all",
    "exact_match",
    "interval",
    "label_accuracy",
    "merge_data",
    "paired",
]
