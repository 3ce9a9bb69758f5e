"""`python -m infoutil_fast` is `infoutil`."""

import sys

from infoutil_fast.cli import main

sys.exit(main())
