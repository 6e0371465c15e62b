"""``python -m snapfs.cli``: the command without an installed script."""

import sys

from snapfs.cli import main

sys.exit(main())
