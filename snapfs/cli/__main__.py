import sys

from snapfs.cli import main

sys.exit(main())
