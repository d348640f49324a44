"""Build script: all metadata is in pyproject.toml; the native extension (csrc/) is declared here.

Importing torch at the top of this file is not allowed: reading the metadata must work without it.
"""

from setuptools import setup

setup()
