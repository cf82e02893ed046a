"""What holds for all tests."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a loaded machine is no reason to fail
settings.load_profile("untimed")
