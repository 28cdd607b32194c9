"""Package metadata lives in setup.cfg; this file lets `pip install -e .` work with every pip."""

from setuptools import setup


setup()
