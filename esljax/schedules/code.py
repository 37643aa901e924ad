"""Lines of code that hold the values of a schedule as a table, for optax and for PyTorch."""

import textwrap
from collections.abc import Callable

import numpy as np


def optax_lines(summary: str, values: np.ndarray) -> str:
    """Code of an optax schedule. **Args:** `values`: at the K counts of a run and at its end."""
    return _lines(
        "import jax.numpy as jnp\nimport optax",
        _comment(summary),
        f"rates = jnp.array({_literal(values)})",
        *_function(f"rates[jnp.clip(jnp.asarray(count, int), 0, {values.size - 1})]"),
        "optimizer = optax.sgd(learning_rate=schedule)  # or another optimizer",
    )


def pytorch_lines(summary: str, values: np.ndarray) -> str:
    """Code of a PyTorch `LambdaLR`. **Args:** `values`: at the K counts of a run and at its end."""
    return _lines(
        "import torch",
        _comment(summary),
        f"rates = {_literal(values)}",
        *_function(f"rates[min(count, {values.size - 1})]"),
        "for group in optimizer.param_groups:",
        '    group["lr"] = group["initial_lr"] = 1.0  # LambdaLR multiplies it by the rate',
        "scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)",
        "# After each optimizer.step(): scheduler.step()",
    )


LIBRARIES: dict[str, Callable[[str, np.ndarray], str]] = {
    "optax": optax_lines,
    "pytorch": pytorch_lines,
}


def _lines(imports: str, *rest: str) -> str:
    return "\n".join([imports, "", *rest])


def _comment(summary: str) -> str:
    mark = "# "
    return textwrap.fill(
        summary, 88, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False
    )


def _function(value: str) -> tuple[str, ...]:
    return ("", "", "def schedule(count):", f"    return {value}", "", "")


def _literal(values: np.ndarray) -> str:
    """A list of the shortest decimals that single precision, or double, reads back exactly."""
    wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    numbers = ", ".join(str(float(str(value))) for value in wide)
    if len(numbers) <= 80:
        return f"[{numbers}]"
    body = textwrap.fill(numbers, 88, initial_indent="    ", subsequent_indent="    ")
    return f"[\n{body},\n]"
