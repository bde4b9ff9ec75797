"""Tables and public data sets as published, turned into records of a datalist and merged: docs/data.md."""

from bundle.data.sources.merge import SOURCES, detect_layout, merge, table

__all__ = ["SOURCES", "detect_layout", "merge", "table"]
