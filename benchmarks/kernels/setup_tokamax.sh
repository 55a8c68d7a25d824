#!/usr/bin/env bash
# Makes benchmarks/.venvs/tokamax, where `python -m benchmarks.kernels` looks for the optional peer; wants Python 3.12 or
# newer (PYTHON_TOKAMAX=/path/to/python). The same libtpu as in the tpu extra: only so are the figures comparable.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venvs/tokamax/bin/python ]; then echo "tokamax: .venvs/tokamax is there already"; exit 0; fi
"${PYTHON_TOKAMAX:-python3.13}" -m venv .venvs/tokamax
.venvs/tokamax/bin/python -m pip install --quiet tokamax==0.0.17 jax==0.12.0.1 libtpu==0.0.52
