"""The command `hf-sparse`."""

from .main import main


__all__ = ["main"]
