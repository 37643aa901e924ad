"""Differentiable simulation of learning as irreversible transport."""
