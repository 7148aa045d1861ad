# SPDX-License-Identifier: Apache-2.0
"""For tools that expect a setup.py; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
