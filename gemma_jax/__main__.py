"""`python -m gemma_jax`."""

import sys

from gemma_jax.cli.main import entry

sys.exit(entry())
