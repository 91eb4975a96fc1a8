"""Helpers that users import: seeds, messages of rank zero, tables about a model."""

from __future__ import annotations

from lightlite.errors import MisconfigurationException
from lightlite.utilities.apply_func import move_data_to_device
from lightlite.utilities.combined_loader import CombinedLoader
from lightlite.utilities.data import suggested_max_num_workers
from lightlite.utilities.distributed import is_shared_filesystem
from lightlite.utilities.enums import GradClipAlgorithmType, LightningEnum
from lightlite.utilities.grads import grad_norm
from lightlite.utilities.parameter_tying import find_shared_parameters, set_shared_parameters
from lightlite.utilities.parsing import AttributeDict, is_picklable
from lightlite.utilities.rank_zero import (
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from lightlite.utilities.seed import isolate_rng, seed_everything
from lightlite.utilities.throughput import Throughput, ThroughputMonitor, measure_flops
from lightlite.utilities.warnings import disable_possible_user_warnings

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "GradClipAlgorithmType",
    "LightningEnum",
    "MisconfigurationException",
    "Throughput",
    "ThroughputMonitor",
    "disable_possible_user_warnings",
    "find_shared_parameters",
    "grad_norm",
    "is_picklable",
    "is_shared_filesystem",
    "isolate_rng",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
    "set_shared_parameters",
    "suggested_max_num_workers",
]
