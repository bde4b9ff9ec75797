"""The warnings that a scan is none for the network."""

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
    """Judge whether the network knows scans like this one, by its slices with lung, or all if none has or that is not known.

    Args:
        distances: of all slices, if there is a `novelty`.
        bearing: whether each slice shows lung; None where the values are not HU.

    Returns:
        The entry "novelty" of predictions.json, None without `novelty`, and the warnings, one line each.
    """
    summary, warnings = None, []
    if novelty is not None:
        kept = np.array([d for d, lung in zip(distances, bearing) if lung] if bearing and any(bearing) else distances)
        share = float((kept > novelty.threshold).mean())
        numbers = {"distance": np.median(kept), "threshold": novelty.threshold, "unusual_share": share}
        summary = {key: round(float(value), 4) for key, value in numbers.items()}
        if share > UNUSUAL_SHARE:
            warnings.append(
                f"unlike the training data: {share:.0%} of {len(kept)} slices are farther from it than "
                f"{novelty.threshold:.1f} (median {np.median(kept):.1f}); do not trust the results"
            )
    if bearing is not None and sum(bearing) < LUNG_SHARE * len(bearing):
        found = f"lung in {sum(bearing)} of {len(bearing)} slices" if any(bearing) else "no lung found"
        warnings.append(f"{found}: this is no chest CT, or its values are not HU; do not trust the results")
    return summary, warnings
