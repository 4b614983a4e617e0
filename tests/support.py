"""What works with which wrapper, with the tests that show it.

The README has this table, which ``python -m tests.support`` prints. ``tests/unit/test_support.py``
checks that it does, and that every test that is named here exists.
"""

from __future__ import annotations

from dataclasses import dataclass

FEATURES = (
    "samples as objectives",
    "tasks as objectives",
    "explicit rows, in groups",
    "accumulation",
    "bf16",
    "checkpoint and resume",
)
BEGIN, END = "<!-- support matrix -->", "<!-- end of the support matrix -->"


@dataclass(frozen=True)
class Row:
    """A wrapper.

    Attributes:
        name: As the README calls it.
        cells: For each of FEATURES the test that shows it, as "file::function" below ``tests/``;
            or words, if there is none.
    """

    name: str
    cells: tuple[str, str, str, str, str, str]


_FSDP = "distributed/test_fully_shard.py::test_any_cut_takes_the_step_of_one_process"
_TP = (
    "distributed/test_tensor_parallel.py::test_tensor_parallel_layers_take_the_step_of_one_process"
)
_RESUME = (
    "distributed/test_checkpoint.py::test_any_wrapper_and_number_of_ranks_goes_on_from_any_other"
)
_DEEPSPEED = "distributed/test_deepspeed.py::test_two_ranks_take_the_step_of_one_process"
_TASKS = "distributed/test_deepspeed_tasks.py::test_two_ranks_take_the_step_of_one_process"
_TRAPS = "distributed/test_deepspeed_traps.py::"
_ACCELERATE = "integrations/test_accelerate.py::"
_PLUGIN = (
    "integrations/test_accelerate_deepspeed.py::test_every_stage_takes_the_step_of_one_process"
)
_LIGHTNING = "integrations/test_lightning.py::"
_TRAINER = "integrations/test_trainer.py::"
_SPLIT = "test_any_split_takes_the_step_of_one_process"
_NARROW = "test_mixed_precision"
_GROUPS = "test_groups_of_explicit_jacobians"
_STATE = "test_its_checkpoints_resume_a_stateful_weighting"
_UNTRIED = "not tried"

ROWS = (
    Row(
        "`DistributedDataParallel`",
        (
            f"distributed/test_invariance.py::{_SPLIT}",
            f"distributed/test_invariance.py::{_SPLIT}",
            "distributed/test_seed_loops.py::test_grouping_loops_over_ranks_equal_one_process",
            "distributed/test_ddp_options.py::test_no_sync_accumulates_the_weighted_gradients",
            _ACCELERATE + _NARROW,
            _RESUME,
        ),
    ),
    Row(
        "`fully_shard`",
        (
            _FSDP,
            _FSDP,
            _FSDP,
            _FSDP,
            "distributed/test_fully_shard.py::test_options_of_the_wrapper",
            _RESUME,
        ),
    ),
    Row(
        "tensor parallelism, alone or in `fully_shard`",
        (_TP, _TP, _TP, _TP, _UNTRIED, _UNTRIED),
    ),
    Row(
        "DeepSpeed, ZeRO 0 to 3",
        (
            _DEEPSPEED,
            _TASKS,
            _TASKS,
            _DEEPSPEED,
            _TRAPS + "test_bfloat16_steps_are_near_those_in_float64",
            _TRAPS + "test_a_checkpoint_resumes_with_the_state_of_the_weighting",
        ),
    ),
    Row(
        "Accelerate, DDP",
        (
            _ACCELERATE + _SPLIT,
            _ACCELERATE + _SPLIT,
            _ACCELERATE + _GROUPS,
            _ACCELERATE + _SPLIT,
            _ACCELERATE + _NARROW,
            _ACCELERATE + _STATE,
        ),
    ),
    Row(
        "Accelerate, DeepSpeed plugin",
        (_PLUGIN, _UNTRIED, _UNTRIED, _PLUGIN, _UNTRIED, _UNTRIED),
    ),
    Row(
        "Lightning, `ddp` (static graph too)",
        (
            _LIGHTNING + _SPLIT,
            _LIGHTNING + _SPLIT,
            _LIGHTNING + _GROUPS,
            _LIGHTNING + _SPLIT,
            _LIGHTNING + _NARROW,
            _LIGHTNING + _STATE,
        ),
    ),
    Row(
        "Lightning, `ModelParallelStrategy` with `fully_shard`",
        (
            _LIGHTNING + _SPLIT,
            _LIGHTNING + _SPLIT,
            _UNTRIED,
            _LIGHTNING + _SPLIT,
            _LIGHTNING + _NARROW,
            _UNTRIED,
        ),
    ),
    Row(
        "Transformers' `Trainer`, DDP",
        (
            _TRAINER + "test_any_number_of_ranks_takes_the_step_of_one_process",
            _TRAINER + "test_any_number_of_ranks_takes_the_step_of_one_process",
            "no: it goes back by itself",
            _TRAINER + "test_any_number_of_ranks_takes_the_step_of_one_process",
            _TRAINER + _NARROW,
            _TRAINER + "test_resuming_restores_a_stateful_weighting",
        ),
    ),
)


def table() -> str:
    """The matrix in Markdown."""
    lines = [f"| | {' | '.join(FEATURES)} |", f"|---|{'---|' * len(FEATURES)}"]
    for row in ROWS:
        cells = ["yes" if "::" in cell else cell for cell in row.cells]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{BEGIN}\n\n{table()}\n\n{END}")
