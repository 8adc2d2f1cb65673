"""`python -m catmaps`, and `torchrun ... -m catmaps`."""

import sys

from catmaps.cli import main

sys.exit(main())
