#!/bin/sh
# An AArch64 Debian userland with Python and what the kernel tests import, for qemu-user: aarch64_root.sh FOLDER
# Runs on Debian and its like, without root. The host's packages and their list stay as they are.
set -eu
root=$(mkdir -p "$1" && cd "$1" && pwd)
state=$root/.apt
mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
touch "$state/status"
as_arm() {
  apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$state" -o Dir::State::lists="$state/lists" \
    -o Dir::State::status="$state/status" -o Dir::Cache="$state/cache" -o Debug::NoLocking=1 "$@"
}
as_arm update
as_arm install -y --no-install-recommends --download-only python3 libc6 libgcc-s1 libstdc++6 libgomp1
for package in "$state"/cache/archives/*.deb; do dpkg -x "$package" "$root"; done
version=$(basename "$(ls -d "$root"/usr/lib/python3.*)" | sed 's/python//')
platforms=$(for n in 2014 _2_17 _2_27 _2_28 _2_34; do echo "--platform manylinux${n}_aarch64"; done)
# shellcheck disable=SC2086  # several words
python3 -m pip install --disable-pip-version-check -q --target "$root/site" --only-binary=:all: --implementation cp \
  --python-version "$version" $platforms numpy msgspec gguf safetensors pytest pytest-timeout hypothesis
echo "HEADWATER_AARCH64_ROOT=$root"
