"""``python -m cli``: the same as ``lictor``, for processes that start others by their interpreter."""

import sys

from cli.main import main

sys.exit(main())
