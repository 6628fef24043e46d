"""A short version of launch/chaos.sh."""

import pytest

import chaos


@pytest.mark.slow
def test_a_run_with_three_faults_ends_like_an_undisturbed_one(tmp_path, capsys):
    chaos.main(["--kills=3", "--steps=80", "--seed=2", f"--folder={tmp_path}"])
    said = capsys.readouterr().out
    assert "Survived" in said and "parts of batches hold the same records" in said
