"""Multi-task chest CT as a MONAI bundle: see README.md. In Python, `from bundle import Model` predicts scans."""

__version__ = "0.4.0"


def __getattr__(name: str):
    """Import `Model` when it is used: torch and MONAI take seconds."""
    if name == "Model":
        from bundle.inference import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
