"""`python -m gemma_jax`."""

import sys

from gemma_jax.cli.main import main

sys.exit(main())
