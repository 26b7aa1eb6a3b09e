"""The pipeline's stages: functions of paths and plain parameters, one per Snakemake rule.

Each stage reads verified artifacts, writes its own whole, and writes a record beside them: seconds, peak
memory, device, versions and what the stage measured. Records are apart from the tensors, so that tensors
are the same bytes whenever the inputs and parameters are the same.
"""

from aasvd.stages.checkpoints import adapt_model, assemble
from aasvd.stages.compression import propagate, refine_block, solve_block
from aasvd.stages.evaluation import evaluate_accuracy, evaluate_perplexity, measure_layers, measure_memory
from aasvd.stages.fetching import fetch_model, fetch_task, fetch_text
from aasvd.stages.originals import (
    average_block,
    capture_block,
    differentiate_block,
    differentiate_head,
    differentiate_weights,
    embed,
    sample_calibration,
)
from aasvd.stages.publication import collect, compare, present, publish, write_key
from aasvd.stages.ranks import allocate, measure_block, train_positions
from aasvd.stages.removals import order_branches
from aasvd.stages.stage import StageError

__all__ = [
    "StageError",
    "adapt_model",
    "allocate",
    "assemble",
    "average_block",
    "capture_block",
    "collect",
    "compare",
    "differentiate_block",
    "differentiate_head",
    "differentiate_weights",
    "embed",
    "evaluate_accuracy",
    "evaluate_perplexity",
    "fetch_model",
    "fetch_task",
    "fetch_text",
    "measure_block",
    "measure_layers",
    "measure_memory",
    "order_branches",
    "present",
    "propagate",
    "publish",
    "refine_block",
    "sample_calibration",
    "solve_block",
    "train_positions",
    "write_key",
]
