"""Imports torch before the rest of the package does, without its warning where numpy is missing.

Importing torch tries numpy out and warns ("Failed to initialize NumPy"). layerstream works without numpy, so the
warning is of no use to who imports it.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch  # noqa: F401 - for what importing it does
