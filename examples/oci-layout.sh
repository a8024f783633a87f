# Sourced by the examples' scripts: writes OCI image layouts with tar, gzip and sha256sum, without root.
# Same inputs, same bytes: members are sorted, times are fixed, owners are 0, gzip stores no name.

set -euo pipefail
export LC_ALL=C

created=2024-01-02T03:04:05Z
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
blobs=$scratch/blobs/sha256
mkdir -p "$blobs"
diff_ids=() layers=()

# add_blob FILE: move a file among the blobs, print its descriptor's digest and size.
add_blob() {
    local digest size
    digest=$(sha256sum "$1" | cut -d' ' -f1)
    size=$(stat -c %s "$1")
    mv "$1" "$blobs/$digest"
    echo "\"digest\":\"sha256:$digest\",\"size\":$size"
}

# add_layer FOLDER: the content of FOLDER becomes the next layer.
add_layer() {
    tar --create --file="$scratch/layer" --directory="$1" --format=posix --sort=name \
        --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' \
        --mtime="$created" --owner=0 --group=0 --numeric-owner .
    diff_ids+=("\"sha256:$(sha256sum "$scratch/layer" | cut -d' ' -f1)\"")
    gzip -9n "$scratch/layer"
    layers+=("{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",$(add_blob "$scratch/layer.gz")}")
}

# write_image LAYOUT CONFIG: the layers so far become the image `latest` of a layout; CONFIG is the OCI config object.
write_image() {
    local IFS=, manifest=application/vnd.oci.image.manifest.v1+json config digest
    cat >"$scratch/config" <<JSON
{"created":"$created","architecture":"$architecture","os":"linux","config":$2,"rootfs":{"type":"layers","diff_ids":[${diff_ids[*]}]}}
JSON
    config="{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",$(add_blob "$scratch/config")}"
    cat >"$scratch/manifest" <<JSON
{"schemaVersion":2,"mediaType":"$manifest","config":$config,"layers":[${layers[*]}]}
JSON
    rm -rf "$1"
    mkdir -p "$1"
    cat >"$scratch/index.json" <<JSON
{"schemaVersion":2,"manifests":[{"mediaType":"$manifest",$(add_blob "$scratch/manifest"),"annotations":{"org.opencontainers.image.ref.name":"latest"}}]}
JSON
    echo '{"imageLayoutVersion":"1.0.0"}' >"$1/oci-layout"
    mkdir -p "$1/blobs/sha256"
    { echo "${layers[*]}" "$config"; cat "$scratch/index.json"; } | grep -o '[0-9a-f]\{64\}' | while read -r digest; do
        cp "$blobs/$digest" "$1/blobs/sha256/"
    done
    cp "$scratch/index.json" "$1/"
}

# busybox_root FOLDER: a root filesystem that is the static busybox and a link for each of its commands.
busybox_root() {
    local busybox command
    busybox=$(command -v busybox) || { echo "busybox is not installed: apt-get install busybox-static" >&2; exit 1; }
    mkdir -p "$1"/{bin,sbin,usr/bin,usr/sbin,usr/local/bin,dev,proc,sys,run,etc,var/log,tmp,root}
    chmod 1777 "$1/tmp"
    chmod 0700 "$1/root"
    cp "$busybox" "$1/bin/busybox"
    chmod 0755 "$1/bin/busybox"
    "$busybox" --list-full | while read -r command; do
        [ "$command" = bin/busybox ] || ln -sf /bin/busybox "$1/$command"
    done
    echo 'root:x:0:0:root:/root:/bin/sh' >"$1/etc/passwd"
    echo 'root:x:0:' >"$1/etc/group"
}

case $(uname -m) in
    x86_64) architecture=amd64 ;;
    aarch64) architecture=arm64 ;;
    *) architecture=$(uname -m) ;;
esac
