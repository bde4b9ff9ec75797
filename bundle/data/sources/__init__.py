"""Public data set layouts, each turned into records of the datalist, and their merge into one. docs/data.md lists them."""

from bundle.data.sources.merge import SOURCES, detect_layout, merge, table

__all__ = ["SOURCES", "detect_layout", "merge", "table"]
