"""`python -m spikelm` is the command `spikelm`."""

import sys

from spikelm.cli import main

sys.exit(main())
