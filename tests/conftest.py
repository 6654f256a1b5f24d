"""What holds for every layer of tests."""

from __future__ import annotations

from hypothesis import settings

# No example of a property test has a deadline: on a loaded machine it would measure the machine. Each test as a whole
# has pytest's timeout.
settings.register_profile("lictor", deadline=None)
settings.load_profile("lictor")
