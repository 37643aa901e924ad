"""Fixtures that every test file may use."""

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision within one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
