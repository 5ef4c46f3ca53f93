#!/usr/bin/env bash
# Make the lock files again: every package at its exact version, with the hashes of all its files. A version that a lock
# holds already stays as long as pyproject.toml allows it; delete the lock to take the newest of everything.
#
#   UV=/path/to/uv deploy/locks/lock.sh     (`make lock` installs uv and does this)
#
# uv resolves from metadata alone, for the systems that pyproject.toml names under [tool.uv], so the lock for a machine
# with CUDA can be made on one without. What a lock leaves out is listed, with reasons, in left-out.txt.
set -euo pipefail
cd "$(dirname "$0")"
project=../../pyproject.toml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed -n 's/^ *"torch==\(.*\)",$/torch===\1+cpu/p' "$project" >"$work/torch.txt"
sed -n 's/^requires = \["\(setuptools.*\)"\]$/\1/p' "$project" >"$work/builder.txt" # it is built without a network
sed -n '/^dev = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' "$project" >"$work/dev.txt"
{ echo "mlflow[auth]" && grep ^psycopg2-binary "$work/dev.txt"; } >"$work/mlflow.txt"

# lock NAME OPTIONS…: a package a line, its hashes behind it.
lock() {
    local name=$1
    shift
    "${UV:-uv}" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --excludes left-out.txt --output-file "$name.txt" "$@"
    sed -z 's/ \\\n */ /g' "$name.txt" | sed 's/ ; [^-]* --hash/ --hash/' >"$name.tmp"
    mv "$name.tmp" "$name.txt"
    echo "$name.txt: $(grep -c == "$name.txt") packages"
}

# PyTorch's CPU build comes from PyTorch's own index, which names each file's hash; install.sh takes it from there.
cpu=(--excludes left-out-cpu.txt --no-emit-package torch --overrides "$work/torch.txt"
    --find-links "${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}")
lock cpu "$project" "$work/builder.txt" --extra cpu "${cpu[@]}"
lock gpu "$project" "$work/builder.txt" --extra gpu
# On top of either of them: only what cpu.txt doesn't hold.
mapfile -t held < <(sed -n 's/^\([^=]*\)==.*/--no-emit-package=\1/p' cpu.txt)
lock dev "$work/dev.txt" --constraints cpu.txt "${cpu[@]}" "${held[@]}"
# The image of MLflow's server.
lock mlflow "$work/mlflow.txt" --constraints cpu.txt
