"""The command `hf-sparse`."""

from .app import main


__all__ = ["main"]
