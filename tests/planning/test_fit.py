"""The search for settings that fit, over made-up memory and time; and a user's command."""

import dataclasses
import os
import subprocess
import sys

import pytest

from hashvision.errors import UserError
from hashvision.planning import fit, plan
from made_up_plan import MADE_UP
from places import CONFIGS


def made_up(state, activations, memory, tried=None):
    """An attempt: GiB of state over fsdp, and of activations, of which each remat saves a fifth."""

    def attempt(choice):
        if tried is not None:
            tried.append(choice)
        saved = 1 - sum(choice.remat) / 5
        needed = state / choice.fsdp + activations * saved / choice.accumulate
        if needed > memory:
            raise plan.DoesNotFit("no")
        # A part costs a tenth, a stage computed again two hundredths.
        cycles = 1e6 * (1 + 0.1 * (choice.accumulate - 1) + 0.02 * sum(choice.remat))
        return dataclasses.replace(
            MADE_UP, cycles=int(cycles), collectives=[], held={"all": int(needed * 2**30)}
        )

    return attempt


def search(state, activations, memory, parts=(1, 2, 4), tried=None):
    fits = lambda width: state / width <= fit.STATE_SHARE * memory  # noqa: E731
    attempt = made_up(state, activations, memory, tried)
    return fit.search((1, 2, 4, 8), parts, fits, attempt).choice


def test_what_fits_as_it_is_stays_as_it_is():
    tried = []
    assert search(4, 6, 16, tried=tried) == (1, 1, (False,) * 4)
    assert len(tried) == 1


def test_the_state_is_sharded_no_wider_than_it_has_to_be():
    assert search(24, 2, 16).fsdp == 4  # 24 / 4 is within 0.4 of 16, and 24 / 2 is not


def test_no_wider_state_is_built_once_one_fits():
    asked = []

    def fits(width):
        asked.append(width)
        return width == 2

    assert fit.search((1, 2, 4, 8), (1,), fits, made_up(4, 2, 16)).choice.fsdp == 2
    assert asked == [1, 2]


def test_the_least_remat_that_fits_is_taken_before_more_parts_cost_more():
    assert search(4, 16, 16) == (1, 1, (True, True, False, False))  # 4 + 16 * 3 / 5 <= 16


def test_more_parts_are_taken_where_no_remat_is_enough():
    assert search(4, 100, 16) == (1, 2, (True,) * 4)


def test_what_fits_nowhere_is_said_in_a_sentence():
    with pytest.raises(UserError, match="take more chips"):
        search(4, 1000, 16)


def test_parts_keep_the_groups_of_batchnorm():
    assert fit.parts_of(96, 8, 0) == fit.parts_of(96, 8, 96) == [1]
    assert fit.parts_of(96, 8, 8) == [1, 2, 3, 4, 6, 12]
    assert fit.parts_of(96, 8, 24) == [1, 2, 4]  # 3 parts would hold 32 photos each
    assert fit.parts_of(8192, 1024, 1024) == [1, 2, 4, 8]


def test_overrides_are_those_of_a_command():
    overrides = fit.Choice(8, 2, (True, False, False, False)).overrides()
    assert overrides == (
        "--config.mesh.fsdp=8 --config.accumulate=2 --config.model.remat='(True,False,False,False)'"
    )


@pytest.mark.slow
def test_fit_on_simulated_cpus_prints_what_to_paste():
    command = [sys.executable, "-m", "hashvision", "plan", f"--config={CONFIGS / 'demo.py'}"]
    command += ["--topology=cpu:2", "--fit", "--config.batch_size=8", "--config.model.unroll=1"]
    command += ["--config.data.crops=((1, 32, 0.2, 1.0),)"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "BatchNorm takes all photos together (model.norm_photos)" in done.stdout
    assert "of those that fit: --config.mesh.fsdp=1 --config.accumulate=1 --config" in done.stdout
