"""Warns of weights that the loss does not depend on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence


logger = logging.getLogger(__name__)

_MAX_NAMES = 12
"""Names in one warning."""


def warn_of_unreached(names: Sequence[str], method: str) -> None:
    """Logs one warning that names weights without a gradient, which a method prunes first, and what to do about it.

    Args:
        names: of the weights; none are not warned of.
        method: as in 'criterion "snip"'.
    """
    if not names:
        return
    modules = [name.removesuffix(".weight") for name in names]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    logger.warning(
        "the loss does not depend on %d selected %s, so %s prunes %s first: %s%s. Exclude what the model needs, as "
        "with exclude=%s.",
        len(names),
        *("weight", method, "it") if len(names) == 1 else ("weights", method, "them"),
        ", ".join(names[:_MAX_NAMES]),
        more,
        json.dumps(modules[:_MAX_NAMES]),
    )
