"""`accelerate launch -m spikelm_train RUN.yaml --out DIR`, one process per device."""

import sys

from spikelm.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
