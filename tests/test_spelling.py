"""One spelling of each schedule, at every door that takes a name."""

import pytest

import esljax as esl
from esljax.experiment import RUN_SCHEDULES, spelled

SHAPES = esl.usual_shapes()


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ("wsd", "warmup_stable_decay"),
        ("WarmupStableDecay", "warmup_stable_decay"),
        ("warmup-stable-decay", "warmup_stable_decay"),
        ("warmup–stable–decay", "warmup_stable_decay"),
        ("Cosine", "cosine"),
        ("linear decay", "linear_decay"),
        ("linear", "linear_decay"),
        ("exponential", "exponential_decay"),
    ],
)
def test_other_spellings_are_read_and_said(other, name):
    words = f"The schedule '{other}' is spelled '{name}' here."
    with pytest.warns(UserWarning, match=words):
        assert spelled(other, RUN_SCHEDULES) == name
    with pytest.warns(UserWarning, match=words):
        assert esl.RunConfig(schedule=other).schedule == name
    with pytest.warns(UserWarning, match=words):
        assert esl.study.Study(esl.RunConfig(), {"schedule": [other]}).grid["schedule"] == (name,)
    with pytest.warns(UserWarning, match=words):
        study = esl.study.Study.from_dict({"base": {"schedule": other}, "grid": {"seed": [0]}})
    assert study.base.schedule == name
    with pytest.warns(UserWarning, match=words):
        assert str(SHAPES[other]) == str(SHAPES[name])


def test_families_are_spelled_alike():
    families = esl.usual_families()
    for name in families:
        assert name.removesuffix("_tuned") in (*SHAPES, "exponential")
    with pytest.warns(UserWarning, match="'exponential' is spelled 'exponential_tuned' here"):
        assert families["exponential"] is families["exponential_tuned"]
    with pytest.raises(KeyError):
        families["wave"]


def test_unknown_names_stay_unknown(refused):
    refused(
        lambda: esl.RunConfig(schedule="wave").check(), "`schedule` must be one of .*but is 'wave'"
    )
