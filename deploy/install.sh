#!/usr/bin/env bash
# Install the project and its locked packages into .venv. Whatever is wrong is said in one line.
#
#   deploy/install.sh          what a run needs
#   deploy/install.sh dev      and what tests and checks need
#
# Environment: PYTHON (an interpreter, 3.11 to 3.13), ACCELERATOR (cpu or gpu; default: what nvidia-smi says).
# A file .venv/.complete-<accelerator> is written last; a .venv without it is half-finished, and made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

log=.venv/install.log
pytorch_index=https://download.pytorch.org/whl/cpu
fail() { trap - ERR; echo "install: $*" >&2; exit 1; }
trap 'fail "stopped unexpectedly at line $LINENO of deploy/install.sh; see $log"' ERR
pip() { .venv/bin/python -m pip "$@" >>"$log" 2>&1; }
last_error() { grep -a '^ *ERROR:' "$log" | tail -n 1 | sed 's/^ *ERROR: *//' || true; }
usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
version() { "$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null || echo "no Python"; }

# --- What this machine has ---
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the locked packages are for Linux x86_64; this is $(uname -sm)"
if [ -z "${ACCELERATOR:-}" ]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then ACCELERATOR=gpu; else ACCELERATOR=cpu; fi
fi
case $ACCELERATOR in
    cpu) need_gb=8 minutes="3 minutes" ;;
    gpu) need_gb=20 minutes="10 minutes" ;;
    *) fail "ACCELERATOR=$ACCELERATOR is neither cpu nor gpu" ;;
esac
lock=deploy/locks/$ACCELERATOR.txt
complete=.venv/.complete-$ACCELERATOR

doing=Installing
exec 9<deploy/install.sh && flock 9 # two at once would break each other's .venv; the second waits

if [ ! -e "$complete" ]; then
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is $(version "$PYTHON"); Python 3.11, 3.12 or 3.13 is needed"
        python=$PYTHON
    else
        for python in python3 python3.13 python3.12 python3.11 none; do
            if usable "$python"; then break; fi
        done
        [ "$python" != none ] || fail "Python 3.11, 3.12 or 3.13 is needed, and python3 is $(version python3);" \
            "install one, or name it: make install PYTHON=/path/to/python3.11"
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python can't make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)"
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free_gb" -ge "$need_gb" ] ||
        fail "$PWD has $free_gb GB free and the $ACCELERATOR packages need $need_gb GB; free some, or clone elsewhere"

    "$python" -m venv --clear .venv >/dev/null || fail "$python could not make .venv; is $PWD writable?"
else
    doing=Updating minutes="half a minute" # .venv is whole, and most of it stays as it is
fi

# --- Packages ---
rm -f .venv/.complete-*
mkdir -p .venv/tmp && : >"$log"
export TMPDIR=$PWD/.venv/tmp PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USE_PEP517=1
# Exactly the lock: nothing resolved, every file by its hash, and what comes as source is built with the lock's setuptools.
install=(install --no-deps --no-build-isolation --no-compile)
# locked OPTIONS PATTERN: installs the lock's lines that grep finds so.
locked() {
    grep "$@" "$lock" >.venv/tmp/locked.txt
    pip "${install[@]}" --require-hashes -r .venv/tmp/locked.txt
}

echo "$doing $(grep -c == "$lock") packages ($ACCELERATOR) in .venv (about $minutes) …"
PIP_RETRIES=1 locked '^setuptools==' ||
    fail "pip can't get $(grep -oE '^setuptools==[^ ]+' "$lock") from its package index: check the network, the proxy" \
        "(https_proxy) or the mirror (PIP_INDEX_URL); pip's words are in $log"

if [ "$ACCELERATOR" = cpu ]; then
    # Some machines carry PyTorch's CPU build in pip's own settings; the others get it from PyTorch, whose index has hashes.
    torch=$(sed -n 's/^ *"\(torch==.*\)",$/\1+cpu/p' pyproject.toml)
    pip "${install[@]}" --retries 1 "$torch" || pip "${install[@]}" --extra-index-url "$pytorch_index" "$torch" ||
        fail "pip finds $torch neither by its own settings nor at $pytorch_index: allow that address, or" \
            "put the wheel in a folder and set PIP_FIND_LINKS to it; pip's words are in $log"
fi
locked -v '^pycosat==' || fail "pip failed: $(last_error) (all of it in $log)"

# pycosat has no wheels. One reasoning-gym task (zebra_puzzles) calls it, but all of reasoning-gym imports it.
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
if ! locked '^pycosat=='; then
    echo "  pycosat didn't build (no C compiler?): all but reasoning-gym's zebra_puzzles works without it"
    cat >"$site/pycosat.py" <<'STAND_IN'
def itersolve(*args, **kwargs):
    raise RuntimeError("zebra_puzzles needs pycosat: install a C compiler and Python's headers, then `make clean install`")
solve = itersolve
STAND_IN
fi

if [ "${1:-}" = dev ]; then
    echo "Installing $(grep -c == deploy/locks/dev.txt) packages for tests and checks …"
    pip "${install[@]}" --require-hashes -r deploy/locks/dev.txt || fail "pip failed: $(last_error) (all of it in $log)"
fi
pip "${install[@]}" -e . || fail "pip can't install this project: $(last_error) (all of it in $log)"
.venv/bin/python -m compileall -qq -j 0 "$site" >>"$log" 2>&1 || true # some packages carry Python 2 templates

rm -r .venv/tmp
touch "$complete"
if [ "${1:-}" = dev ]; then touch "$complete-dev"; fi
echo "Installed."
