"""`python -m castore.cli`: the same as the `castore` command. Nothing else here."""

import sys

from castore.cli.main import main

sys.exit(main())
