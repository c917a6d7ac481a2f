"""Bootstrap intervals of means over tasks of shares of rows."""

from adaptlib.evaluation.statistics import LEVEL, RESAMPLES, interval

__all__ = ["LEVEL", "RESAMPLES", "interval"]
