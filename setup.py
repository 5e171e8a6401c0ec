"""Adds the folder configs/ to the packages; everything else stands in setup.cfg."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["trainkit*"]), "trainkit.model_zoo.configs"])
