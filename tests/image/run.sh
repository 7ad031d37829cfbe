#!/usr/bin/env bash
# Build the CPU image without a Docker engine, on a Debian base made here, and use it: what `make image-test` does.
# All of it, the images too, lies in one temporary folder that is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
  echo "image-test: skipped: $1"
  exit 0
}
[ "$(id -u)" = 0 ] || skip "it needs root"
for tool in buildah mmdebstrap; do
  command -v "$tool" > /dev/null || skip "there is no $tool (apt-get install buildah mmdebstrap)"
done

work=$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" hmoe_image.XXXXXX)
buildah() {
  command buildah --root "$work/storage" --runroot "$work/run" "$@"
}
clean_up() {
  buildah rm --all > /dev/null || true
  umount "$work/storage/overlay" 2> /dev/null || true
  rm -rf "$work"
}
trap clean_up EXIT

step() {
  echo "=== image-test, ${SECONDS} s: $1"
}
fail() {
  echo "image-test: $1" >&2
  exit 1
}

step "this machine's pip settings and certificates, as secrets of the build"
# Part of each secret, to be looked for in what was built.
marker=secret-of-${work##*.}
pip_setting() {
  "${PYTHON:-python3}" -m pip config list | sed -nE "s/^[^.]*\.$1='(.*)'$/\1/p" | head -1
}
mkdir "$work/secrets" "$work/wheels"
# Folders of wheels are mounted on one that the base has, so that no trace is left of them.
links=/mnt
for place in $(pip_setting find-links); do
  if [ -d "$place" ]; then cp "$place"/* "$work/wheels"; else links+=" $place"; fi
done
{
  echo "# $marker"
  echo "[global]"
  echo "find-links = $links"
  for name in index-url extra-index-url trusted-host proxy timeout default-timeout; do
    # An index on this machine's disk is not there in the build.
    value=$(pip_setting "$name" | sed 's#file:[^ ]*##g' | xargs)
    [ -z "$value" ] || echo "$name = $value"
  done
} > "$work/secrets/pipconf"
secrets=(--secret "id=pipconf,src=$work/secrets/pipconf")
certificates=$(pip_setting cert)
if [ -n "$certificates" ]; then
  echo "cert = /run/secrets/cacert" >> "$work/secrets/pipconf"
  (cat "$certificates" && echo "# $marker") > "$work/secrets/cacert"
  secrets+=(--secret "id=cacert,src=$work/secrets/cacert")
fi

step "the base"
mmdebstrap --quiet --variant=minbase --mode=root \
  --customize-hook='rm -rf "$1/etc/resolv.conf" "$1/etc/hostname" "$1"/var/lib/apt/lists/*' bookworm "$work/base.tar"
base=localhost/debian-base:bookworm
printf 'FROM scratch\nADD base.tar /\n' > "$work/Dockerfile.base"
buildah build --quiet --isolation chroot --format docker --tag "$base" --file "$work/Dockerfile.base" "$work"
rm "$work/base.tar"

step "the image"
image=localhost/hmoe_ds:cpu
buildah build --isolation chroot --network host --format docker --file docker/Dockerfile --tag "$image" \
  --build-arg DEVICE=cpu --build-arg "BASE_IMAGE=$base" --build-arg "REVISION=$(git rev-parse HEAD || true)" \
  "${secrets[@]}" --volume "$work/wheels:/mnt:ro" . > "$work/build.log" 2>&1 ||
  { tail --lines 60 "$work/build.log"; fail "the image was not built"; }
built=$SECONDS

step "no secret in its layers, history or environment"
buildah push --quiet --disable-compression "$image" "dir:$work/pushed"
grep -aqrF "class HMoEModel" "$work/pushed" || fail "the layers cannot be searched"
if grep -aqrF "$marker" "$work/pushed"; then fail "a secret of the build is in a layer"; fi
buildah inspect --type image "$image" > "$work/inspect.json"
for url in $(grep -oE '[a-z]+://[^ ]+' "$work/secrets/pipconf"); do
  if grep -qF "$url" "$work/inspect.json"; then fail "a setting of pip is in the history or environment"; fi
done
size=$(du --summarize --block-size=1M "$work/pushed" | cut -f1)
rm -r "$work/pushed"

container=$(buildah from "$image")
inside() {
  buildah run --isolation chroot "$container" -- "$@"
}

step "the user, the files, the labels"
[ "$(inside id --user)" = 1000 ] || fail "the user is not hmoe"
# What a build may leave: the places of secrets, and the settings of this machine.
left=$(buildah run --isolation chroot --user root "$container" -- \
  find / -xdev \( -name pipconf -o -name cacert -o -name pip.conf \) -not -path "/proc/*")
[ -z "$left" ] || fail "left by the build: $left"
version=$(inside python -c "from importlib.metadata import version; print(version('hmoe-ds'))")
grep -q "image.version\": \"$version\"" "$work/inspect.json" || fail "the label of the version is not $version"

step "hmoe doctor"
inside hmoe doctor

step "molecules, 2-rank pretraining, export, embeddings"
inside hmoe prepare nci5k --out dataset
pretrain=(hmoe pretrain --config tiny_cpu --num_ranks 2 --parallel.ep_size 2 --data.path dataset)
inside "${pretrain[@]}" --run.out run --run.steps 20
inside hmoe export run model
inside bash -c 'printf "CC(=O)Oc1ccccc1C(=O)O aspirin\n" > library.smi'
inside hmoe embed model library.smi --out embeddings.parquet

step "SIGTERM reaches a run through the entry point: it saves and ends with exit code 85"
inside bash -c '
  tini -s -- "$@" & process=$!
  until [ -s stopped/metrics.jsonl ]; do sleep 0.2; kill -0 $process || exit 1; done
  kill -TERM $process
  code=0; wait $process || code=$?
  [ $code = 85 ]' -- "${pretrain[@]}" --run.out stopped --run.steps 100000

step "the unit tests, against what is installed in the image"
# What they need beyond the image goes into this container alone, by a newer pip than that of Debian 12, which reads the
# metadata of all that is installed again and again, for many minutes.
buildah run --isolation chroot --user root --env PIP_CONFIG_FILE=/run/secrets/pipconf \
  --volume "$work/secrets:/run/secrets:ro" --volume "$work/wheels:/mnt:ro" \
  --volume "$PWD/constraints.txt:/tmp/constraints.txt:ro" "$container" -- bash -c '
    pip install --quiet --no-cache-dir --upgrade pip &&
    pip install --quiet --no-cache-dir --constraint /tmp/constraints.txt "hmoe-ds[test]" &&
    pip install --quiet --no-cache-dir --constraint /tmp/constraints.txt --no-deps ogb'
inside mkdir checks
mounts=()
for path in pyproject.toml tests docs launchers; do
  mounts+=(--volume "$PWD/$path:/home/hmoe/checks/$path:ro")
done
# Left out: what follows from the code alone, wherever it runs, and takes minutes; what is about files of the checkout.
without=()
for name in config_ranges gate_properties imports layer_benchmark plan_properties scaling_model size; do
  without+=(--ignore "tests/unit/test_$name.py")
done
buildah run --isolation chroot "${mounts[@]}" --workingdir /home/hmoe/checks "$container" -- \
  python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider tests/unit "${without[@]}"

echo "image-test: passed; the image has ${size} MB; it was built in ${built} s and all of this took ${SECONDS} s"
