"""The tests run the notebooks in a small size."""

import os

os.environ.setdefault("ESLJAX_SMOKE", "1")
