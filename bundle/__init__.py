"""Multi-task chest CT as a MONAI bundle: see README.md."""

__version__ = "0.2.0"
