"""Warns of weights that the loss does not depend on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence


logger = logging.getLogger(__name__)

_MAX_NAMES = 12
"""Names in one warning."""


def warn_of_unreached(names: Sequence[str], method: str, effect: str = "prunes {} first") -> None:
    """Logs one warning that names weights without a gradient, what a method does with them, and what to do about it.

    Args:
        names: of the weights; none are not warned of.
        method: as in 'criterion "snip"'.
        effect: what it does with them, where {} stands for "it" or "them".
    """
    if not names:
        return
    modules = [name.removesuffix(".weight") for name in names]
    noun, pronoun = ("weight", "it") if len(names) == 1 else ("weights", "them")
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    logger.warning(
        "the loss does not depend on %d selected %s, so %s %s: %s%s. Exclude what the model needs, as "
        "with exclude=%s.",
        len(names),
        noun,
        method,
        effect.format(pronoun),
        ", ".join(names[:_MAX_NAMES]),
        more,
        json.dumps(modules[:_MAX_NAMES]),
    )
