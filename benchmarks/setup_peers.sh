#!/usr/bin/env bash
# Makes an environment for each peer under benchmarks/.venvs: setup_peers.sh [huggingface] [llama_cpp] [deepmind]
# Versions are pinned: figures are those of these versions. An environment that exists is left alone; delete it to renew.
set -euo pipefail
cd "$(dirname "$0")"

venv() {  # venv NAME PYTHON: false if it is there already
  if [ -x ".venvs/$1/bin/python" ]; then echo "$1: .venvs/$1 is there already"; return 1; fi
  # a pyenv shim is on the PATH even where its version is not chosen, so the python is tried
  "$2" -c "" 2> /dev/null || {
    echo "$1: $2 does not run; name one: PYTHON_$(echo "$1" | tr '[:lower:]' '[:upper:]')=/path/to/$2 $0 $1" >&2
    exit 1
  }
  echo "$1: making .venvs/$1 with $2"
  "$2" -m venv ".venvs/$1"
  ".venvs/$1/bin/python" -m pip install --quiet --upgrade pip
}

huggingface() {
  venv huggingface "${PYTHON_HUGGINGFACE:-python3.11}" || return 0
  .venvs/huggingface/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors
}

llama_cpp() {  # compiled here, for this processor
  venv llama_cpp "${PYTHON_LLAMA_CPP:-python3.11}" || return 0
  .venvs/llama_cpp/bin/python -m pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36
}

deepmind() {  # wants Python 3.12. Its tools for agents and clusters (fastmcp, xmanager) are left out: not used here,
              # and with them pip's search for versions that fit does not end.
  venv deepmind "${PYTHON_DEEPMIND:-python3.12}" || return 0
  .venvs/deepmind/bin/python -m pip install --quiet --no-deps gemma==4.0.1 kauldron==1.4.4
  .venvs/deepmind/bin/python -m pip install --quiet \
    jax==0.10.2 flax==0.12.8 orbax-checkpoint==0.12.8 'etils[edc,enp,epath,epy,etree]' einops grain jaxtyping \
    sentencepiece==0.2.1 treescope chex clu immutabledict lark ml_collections optax typeguard tqdm absl-py dialog safetensors \
    mediapy tabulate 'protobuf<7' tensorflow-cpu tensorboard tensorflow_datasets pandas scikit-learn scikit-image \
    altair graphviz opencv-python-headless
}

for peer in "${@:-huggingface llama_cpp deepmind}"; do
  for name in $peer; do
    case "$name" in
      huggingface | llama_cpp | deepmind) "$name" ;;
      *) echo "unknown peer $name; there are huggingface, llama_cpp, deepmind" >&2; exit 2 ;;
    esac
  done
done
