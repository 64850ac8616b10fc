"""The model that methods are tested on."""

from tests.methods.conftest import setup as setup
