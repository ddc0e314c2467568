"""`python -m sparse_dit.app` is `sparse-dit`."""

import sys

from sparse_dit.app.cli import main

sys.exit(main())
