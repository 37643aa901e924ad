"""The table of reference numbers: it agrees, it says so, and one wrong digit is seen."""

import dataclasses

import jax
import jax.numpy as jnp
import oracles
import pytest

from esljax.command import check as references
from esljax.command.cli import main


def test_all_reference_numbers_agree(capsys):
    assert references.run_checks()
    printed = capsys.readouterr().out
    assert printed.count("pass") == len(references.CHECKS)
    assert "FAIL" not in printed
    assert "…" not in printed  # nothing cut off at 80 columns
    assert not jax.config.jax_enable_x64


def test_the_table_holds_the_numbers_of_the_theory():
    """Against the oracles, so that no reference can be bent to the computed value."""
    held = {(check.name, check.reference) for check in references.CHECKS}
    wanted = {("O1", number) for row in oracles.O1.values() for number in row}
    wanted |= {("O2", number) for number in oracles.O2.values()}
    wanted |= {
        ("O3", number) for row in oracles.O3_ENTROPY_PRODUCTION.values() for number in row.values()
    }
    wanted |= {("O3", number) for row in oracles.O3_PATH.values() for number in row}
    wanted |= {("O3", number) for number in oracles.O3_OPTIMUM}
    wanted |= {("O5", number) for row in oracles.O5.values() for number in row}
    wanted |= {("O12", number) for number in oracles.O12.values()}
    wanted |= {("O14", round(oracles.O14, 8))} | {("O15", number) for number in oracles.O15}
    assert wanted <= held
    assert sum(check.name == "∇" for check in references.CHECKS) == 6
    assert all(0 < check.tolerance <= 2e-3 for check in references.CHECKS)


def cheap(**changes):
    """The row that needs no compilation worth mentioning, perhaps with a planted error."""
    row = next(check for check in references.CHECKS if check.what == "W2² of clouds")
    return dataclasses.replace(row, **changes)


def test_a_wrong_digit_fails_and_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(references, "CHECKS", (cheap(), cheap(reference=0.94461487)))
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert (printed.count("pass"), printed.count("FAIL")) == (1, 1)
    assert "1 of them do not agree" in printed


def test_quiet_prints_failures_only(monkeypatch, capsys):
    monkeypatch.setattr(references, "CHECKS", (cheap(),))
    assert main(["check", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(references, "CHECKS", (cheap(), cheap(reference=-0.94461486)))
    assert main(["check", "--quiet"]) == 1
    assert "pass" not in capsys.readouterr().out


def broken():
    raise RuntimeError("no such device")


@pytest.mark.parametrize(
    ("compute", "printed"), [(lambda: jnp.nan, "nan"), (lambda: jnp.inf, "inf"), (broken, "device")]
)
def test_what_gives_no_number_fails(monkeypatch, capsys, compute, printed):
    monkeypatch.setattr(references, "CHECKS", (cheap(compute=compute),))
    assert not references.run_checks()
    assert printed in capsys.readouterr().out
    assert not jax.config.jax_enable_x64


def test_precision_is_set_back(monkeypatch, x64):
    monkeypatch.setattr(references, "CHECKS", (cheap(),))
    assert references.run_checks(quiet=True)
    assert jax.config.jax_enable_x64
