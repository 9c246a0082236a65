"""Everything that is static is in pyproject.toml. This file is only for the optional native extension: sources in
csrc/, bound as icon2_rt._native. It is optional in the strict sense: without sources or without a compiler the
install is pure Python, and `icon2 doctor` says what is missing.
"""

from setuptools import setup

setup()
