"""The short form of launch/chaos.sh."""

import pytest

import chaos


@pytest.mark.slow
def test_a_run_that_is_harmed_three_times_ends_as_one_left_alone(tmp_path, capsys):
    chaos.main(["--kills=3", "--steps=60", "--seed=2", f"--folder={tmp_path}"])
    said = capsys.readouterr().out
    assert "Survived" in said and "parts of batches were shown, the same" in said
