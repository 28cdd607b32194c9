"""Lets tools that expect a setup.py work; the metadata of the package is in setup.cfg."""

from setuptools import setup


setup()
