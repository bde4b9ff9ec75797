"""The warnings that a scan is unlike those that the network was trained on, or no chest CT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bundle.networks import Novelty

# A scan is unusual with more than this share of its slices beyond the threshold, and no chest CT with less than this share
# with lung: the three chest CTs that were tried have 77 to 96 %, an abdomen CT, with the base of the lung, 5 %.
UNUSUAL_SHARE, LUNG_SHARE = 0.5, 0.25


def assess(
    novelty: Novelty | None, distances: Sequence[float] | None, bearing: Sequence[bool] | None
) -> tuple[dict[str, float] | None, list[str]]:
    """Judge a scan by its slices with lung, or by all if none has lung or that is not known.

    `distances` are of all slices, `bearing` says whether each shows lung and is None where the values are not HU.
    Returns the entry "novelty" of predictions.json, None without `novelty`, and the warnings, one line each.
    """
    summary, warnings, advice = None, [], "do not trust the results"
    if novelty is not None:
        kept = np.array([d for d, lung in zip(distances, bearing) if lung] if bearing and any(bearing) else distances)
        middle, limit, share = float(np.median(kept)), novelty.threshold, float((kept > novelty.threshold).mean())
        summary = {"distance": round(middle, 4), "threshold": round(limit, 4), "unusual_share": round(share, 4)}
        if share > UNUSUAL_SHARE:
            far = f"{share:.0%} of {len(kept)} slices are farther from it than {limit:.1f} (median {middle:.1f})"
            warnings.append(f"unlike the training data: {far}; {advice}")
    if bearing is not None and sum(bearing) < LUNG_SHARE * len(bearing):
        found = f"lung in {sum(bearing)} of {len(bearing)} slices" if any(bearing) else "no lung found"
        warnings.append(f"{found}: this is no chest CT, or its values are not HU; {advice}")
    return summary, warnings
