"""Evaluation: how well a model, with or without experts, does a task; and what routers do.

A new metric is a function and one line in METRICS.
"""

from adaptlib.evaluation.answers import Limits
from adaptlib.evaluation.cache import Cache
from adaptlib.evaluation.compare import compare, own_experts
from adaptlib.evaluation.evaluate import Result, Subject, evaluate
from adaptlib.evaluation.merge_data import merge_data
from adaptlib.evaluation.metrics import METRICS
from adaptlib.evaluation.score import Score, exact_match, label_accuracy
from adaptlib.evaluation.statistics import interval, paired

__all__ = [
    "METRICS",
    "Cache",
    "Limits",
    "Result",
    "Score",
    "Subject",
    "compare",
    "evaluate",
    "exact_match",
    "interval",
    "label_accuracy",
    "merge_data",
    "own_experts",
    "paired",
]
