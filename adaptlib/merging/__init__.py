"""Merging: several experts in, one expert out.

A new merge is one file, the formula for one module, and one line in MERGES.
"""

from adaptlib.merging.breadcrumbs import breadcrumbs
from adaptlib.merging.core_space import core_space
from adaptlib.merging.dare import dare_linear, dare_ties
from adaptlib.merging.della import della
from adaptlib.merging.fisher import fisher, information
from adaptlib.merging.iso_c import iso_c
from adaptlib.merging.knots import knots
from adaptlib.merging.linear import cat, linear, svd, task_arithmetic
from adaptlib.merging.lorahub import lorahub, search
from adaptlib.merging.magnitude_prune import magnitude_prune
from adaptlib.merging.merge import Data, Measured, Merge, Part
from adaptlib.merging.regmean import inputs, regmean
from adaptlib.merging.slerp import slerp
from adaptlib.merging.ties import ties
from adaptlib.merging.tsv import tsv
from adaptlib.merging.uniform_sparse import uniform_sparse
from adaptlib.merging.wudi import wudi

MERGES: dict[str, Merge] = {
    "breadcrumbs": Merge(breadcrumbs),
    "cat": Merge(cat),
    "core_space": Merge(core_space),
    "dare_linear": Merge(dare_linear, weight="mean"),
    "dare_ties": Merge(dare_ties),
    "della": Merge(della),
    "fisher": Merge(fisher, weight="mean", measure=information),
    "iso_c": Merge(iso_c),
    "knots": Merge(knots),
    "linear": Merge(linear, weight="mean"),
    "lorahub": Merge(lorahub, weight="mean", measure=search),
    "magnitude_prune": Merge(magnitude_prune, weight="mean"),
    "regmean": Merge(regmean, weight="mean", measure=inputs),
    "slerp": Merge(slerp),
    "svd": Merge(svd, rank="largest"),
    "task_arithmetic": Merge(task_arithmetic),
    "ties": Merge(ties),
    "tsv": Merge(tsv),
    "uniform_sparse": Merge(uniform_sparse),
    "wudi": Merge(wudi),
}

__all__ = ["MERGES", "Data", "Measured", "Merge", "Part"]
