"""Makes text of others safe for a model card: escapes Markdown and removes secrets."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable


REMOVED = "<removed>"

# Also where it is glued to a word.
_TOKEN_PATTERN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{16,}")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Shorter secrets would match parts of words. Their command-line options are removed by name instead.
_MIN_SECRET_LENGTH = 8

_SPECIAL_CHARACTERS = re.compile(
    r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])"
    # What makes renderers turn bare addresses into links: https://..., mailto:..., www..., name@host.
    r"|:(?=//)|(?<=mailto):|(?<=xmpp):|(?<=www)\.|(?<=[\w.+-])@(?=\w)",
    flags=re.IGNORECASE,
)


def escape(text: object) -> str:
    """Returns `text` on one line, escaped so that Markdown shows it literally in a paragraph, heading or table cell,
    without links to the addresses in it.

    Example:
        >>> escape("a|b <!-- c --> _d_ e_f")
        'a\\\\|b &lt;!-- c --&gt; \\\\_d\\\\_ e_f'
    """
    line = "".join(character if character.isprintable() else " " for character in str(text))
    return _SPECIAL_CHARACTERS.sub(r"\\\g<0>", html.escape(" ".join(line.split()), quote=False))


def code_block(text: str, language: str) -> str:
    """Returns a fenced Markdown code block, whose fence is longer than any run of backticks in `text`.

    Example:
        >>> code_block("a ```` b", "bash").splitlines()
        ['`````bash', 'a ```` b', '`````']
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def remove_secrets(text: str, secrets: Iterable[str | None] = ()) -> str:
    """Removes the given secrets, the tokens of this environment, and whatever looks like an access token of the Hub.

    Example:
        >>> remove_secrets("--name my-secret", ["my-secret"])
        '--name <removed>'
    """
    candidates = {*secrets, *(os.environ.get(name) for name in _TOKEN_VARIABLES)}
    known = [secret for secret in candidates if secret and len(secret) >= _MIN_SECRET_LENGTH]
    for secret in sorted(known, key=len, reverse=True):  # one secret may contain another
        text = text.replace(secret, REMOVED)
    return _TOKEN_PATTERN.sub(REMOVED, text)
