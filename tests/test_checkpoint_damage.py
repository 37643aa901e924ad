"""Damaged checkpoints of a run: the same bits, from an older checkpoint if need be, or one
sentence."""

import warnings

import jax
import numpy as np
import pytest
from damages import copied, damage

import esljax as esl

START = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def run(folder):
    """A run of five rounds; its last two checkpoints stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return esl.simulate(
            esl.Quadratic(1.0),
            esl.Langevin(0.1, 0.1),
            START,
            steps=20,
            snapshots=5,
            key=jax.random.key(0),
            checkpoints=esl.Checkpoints(folder, resume=True, every=0),
        )


def survived(tmp_path, seeds) -> dict[str, int]:
    whole, path = tmp_path / "whole", tmp_path / "copy"
    wanted, ended = np.asarray(run(whole).positions), {"same": 0, "refused": 0}
    for seed in seeds:
        copied(whole, path)
        words = f"{seed}: {damage(path, np.random.default_rng(seed))}"
        try:
            found = np.asarray(run(path).positions)
        except esl.InputError as error:
            found, sentence = None, str(error)
            assert "\n" not in sentence
            assert str(path) in sentence, words
        if found is not None:
            np.testing.assert_array_equal(found, wanted, err_msg=words)
        ended["refused" if found is None else "same"] += 1
    return ended


def test_a_damaged_checkpoint_gives_the_same_bits_or_a_sentence(tmp_path):
    ended = survived(tmp_path, range(20))
    assert ended["same"] > 5, ended


@pytest.mark.slow
def test_three_hundred_damages(tmp_path):
    ended = survived(tmp_path, range(100, 400))
    assert ended["same"] > 100, ended
