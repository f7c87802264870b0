"""Tests that meet a difference of an older release of MLX; they are skipped beside it."""

from importlib.metadata import version

import pytest

# Release: reason: names of tests. `make try-mlx` finds them, in the quick profile on the CPU.
DIFFERENCES = {
    "0.32.0": {
        "an exception while MLX evaluates on the CPU ends the process": (
            "test_a_lost_rank_ends_the_others",
            "test_another_collective",
            "test_another_dtype",
            "test_another_number_of_channels",
            "test_computing_goes_on_after_an_error",
            "test_one_value_in_all",
            "test_one_value_on_all_ranks_together",
            "test_what_is_no_message",
            "test_what_ranks_disagree_about_is_said",
        ),
        "the running variance of mlx.nn is the biased one": (
            "test_checkpoint_of_a_layer_updates_running_statistics_as_mlx_nn",
            "test_gradient_accumulation_follows_the_same_course",
            "test_pruned_layers_work",
            "test_same_outputs_and_statistics",
            "test_three_training_steps_and_an_evaluation",
            "test_training_follows_the_same_course",
            "test_value_and_grad_of_a_model",
        ),
        "arrays without elements cannot be saved": ("test_saved_before_the_first_call",),
    }
}


def difference(item: pytest.Item) -> str | None:
    """What the installed MLX does differently in this test, if it does."""
    name = getattr(item, "originalname", None)
    for reason, tests in DIFFERENCES.get(version("mlx"), {}).items():
        if name in tests:
            return f"in mlx {version('mlx')} {reason}"
    return None
