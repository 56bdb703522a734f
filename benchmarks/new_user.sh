#!/bin/sh
# The time of a new user: from a clone to the first picture, with nothing installed, downloaded or cached before.
#
#     benchmarks/new_user.sh [TORCH_INDEX_URL=URL]   # what follows goes to make
#
# It clones this checkout's last commit into a temporary folder, runs `make setup` and `make demo` there with empty caches of pip and of
# shardwise, and prints the seconds of each; the folder is removed at the end. Downloads depend on the network and the package index.
set -eu
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
export PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME="$folder/cache"
unset PYTHONPATH

before=$(date +%s)
lap() {
    now=$(date +%s)
    echo "[new user] $1: $((now - since)) s, $((now - before)) s from the clone"
    since=$now
}
since=$before
git clone --quiet "$repository" "$folder/shardwise"
cd "$folder/shardwise"
lap "git clone"
make setup "$@"
lap "make setup"
make demo "$@"
test -s report.png
lap "make demo, to its end"
