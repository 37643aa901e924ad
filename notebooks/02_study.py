# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A study, from a file to a figure
#
# How do entropy production, the limit $W_2^2$ and the gap between them depend on the learning rate
# and the size of the ensemble? The answer takes many training runs. A *study* describes them in a
# few lines, runs them in compiled batches, and records every number in one labeled store that can
# be interrupted and resumed.

# %%
import os
import tempfile
from pathlib import Path

import esljax as esl
from esljax.figures import plot_settings, plot_study

smoke = bool(os.environ.get("ESLJAX_SMOKE"))  # the tests run this notebook in a small size
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Describe the runs
# `[base]` holds the settings that all runs share, any of `esl.RunConfig`; `[grid]` holds those that
# vary. The study runs all combinations.

# %%
(folder / "study.toml").write_text(
    f"""
[base]
data = "moons"
hidden = [8]
steps = {20 if smoke else 100}
snapshots = 10
batch_size = 64

[grid]
members = {[4, 6] if smoke else [8, 16, 32]}
schedule = ["constant", "cosine"]
rate = {{start = 0.1, stop = 1.6, num = {2 if smoke else 5}, scale = "log"}}
seed = {{range = [0, {2 if smoke else 12}]}}
"""
)
study = esl.study.Study.from_toml(folder / "study.toml")
print(study.size, "runs:", study.dimensions)

# %% [markdown]
# ## Run it
# On the command line this is `esljax study run study.toml`, with `--processes 4` for processes of
# this machine, `--scheduler ADDRESS` for a dask cluster or `--slurm 8` for SLURM. Runs that differ
# in numbers alone share one compiled program.

# %%
results = esl.study.run_study(study, folder / "study.zarr")
results

# %% [markdown]
# Call it again and it runs nothing twice: a study that was killed resumes where it stopped. Any run
# can be repeated alone, and gives the same bits.

# %%
last = study.point(study.size - 1)
alone = esl.run(last)
stored = results.sel(members=last.members, schedule=last.schedule, rate=last.rate, seed=last.seed)
print("alone", float(alone.report.gap), "stored", float(stored.gap))

# %% [markdown]
# ## Read the results
# The seeds give the error bars. To select, average and compare, use xarray.

# %%
for group in esl.study.summarize(results)[:4]:
    print(group.settings, f"gap {group.means['gap']:.4g} ± {group.errors['gap']:.1g}")

# %%
efficiency = (results.w2_squared / results.entropy_production).mean("seed")
efficiency.sel(schedule="constant").to_series().unstack("rate").round(3)

# %%
plot_settings(esl.study.summarize(results))

# %% [markdown]
# What a schedule pays for a loss: Σ against the final loss, a line for each schedule.

# %%
plot_study(esl.study.summarize(results))
