"""fit.search with made-up memory and time, and `plan --fit` as a user runs it."""

import dataclasses
import os
import subprocess
import sys

import pytest

from hashvision.errors import UserError
from hashvision.planning import fit, plan
from made_up_plan import MADE_UP
from runs import make


def made_up(state, activations, memory, tried=None):
    """An attempt for fit.search that computes memory and time from a simple model.

    Memory in GiB is state / fsdp, plus activations / parts, minus a fifth per rematerialised stage.
    """

    def attempt(choice):
        if tried is not None:
            tried.append(choice)
        saved = 1 - sum(choice.remat) / 5
        needed = state / choice.fsdp + activations * saved / choice.accumulate
        if needed > memory:
            raise plan.DoesNotFit("does not fit")
        # Each further part adds a tenth to the time, each rematerialised stage two hundredths.
        cycles = 1e6 * (1 + 0.1 * (choice.accumulate - 1) + 0.02 * sum(choice.remat))
        return dataclasses.replace(
            MADE_UP, cycles=int(cycles), collectives=[], held={"all": int(needed * 2**30)}
        )

    return attempt


def search(state, activations, memory, parts=(1, 2, 4), tried=None):
    fits = lambda width: state / width <= fit.STATE_SHARE * memory  # noqa: E731
    attempt = made_up(state, activations, memory, tried)
    found = fit.search(widths=(1, 2, 4, 8), parts=parts, state_fits=fits, attempt=attempt)
    return found.choice


def test_a_config_that_fits_is_the_only_attempt():
    tried = []
    assert search(4, 6, 16, tried=tried) == (1, 1, (False,) * 4)
    assert len(tried) == 1


def test_fsdp_is_the_smallest_that_the_state_allows():
    assert search(24, 2, 16).fsdp == 4  # 24 / 4 <= 0.4 * 16 < 24 / 2


def test_larger_fsdp_is_not_built_once_one_fits():
    asked = []

    def fits(width):
        asked.append(width)
        return width == 2

    attempt = made_up(4, 2, 16)
    found = fit.search(widths=(1, 2, 4, 8), parts=(1,), state_fits=fits, attempt=attempt)
    assert found.choice.fsdp == 2
    assert asked == [1, 2]


def test_the_least_remat_that_fits_is_chosen_over_more_parts():
    assert search(4, 16, 16) == (1, 1, (True, True, False, False))  # 4 + 16 * 3 / 5 <= 16


def test_a_batch_is_cut_if_full_remat_does_not_fit():
    assert search(4, 100, 16) == (1, 2, (True,) * 4)


def test_if_nothing_fits_the_message_asks_for_more_chips():
    with pytest.raises(UserError, match="give a topology with more chips"):
        search(4, 1000, 16)


def test_each_part_holds_whole_groups_of_batchnorm():
    assert fit.accumulate_values(96, 8, 0) == fit.accumulate_values(96, 8, 96) == [1]
    assert fit.accumulate_values(96, 8, 8) == [1, 2, 3, 4, 6, 12]
    assert fit.accumulate_values(96, 8, 24) == [1, 2, 4]  # 3 parts would hold 32 photos each
    assert fit.accumulate_values(8192, 1024, 1024) == [1, 2, 4, 8]


def test_overrides_can_be_pasted_into_a_command():
    overrides = fit.Choice(8, 2, (True, False, False, False)).overrides()
    assert overrides == (
        "--config.mesh.fsdp=8 --config.accumulate=2 --config.model.remat='(True,False,False,False)'"
    )


@pytest.mark.slow
def test_fit_on_simulated_cpus_prints_what_to_paste(tmp_path):
    config = f"--config={make(tmp_path) / 'tiny.py'}"
    command = [sys.executable, "-m", "hashvision", "plan", config]
    command += ["--topology=cpu:2", "--fit", "--config.batch_size=8"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in half the time
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "BatchNorm normalises all photos together (model.norm_photos)" in done.stdout
    assert (
        "\nThe fastest settings that fit: --config.mesh.fsdp=1 --config.accumulate=1 --config"
        in done.stdout
    )
