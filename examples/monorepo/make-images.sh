#!/usr/bin/env bash
# Writes layouts/{api,web,worker}: one busybox base, and one layer of its own for each service.
cd "$(dirname "$0")"
. ../oci-layout.sh

umask 022
busybox_root "$scratch/base"
add_layer "$scratch/base"
base_layer=${layers[0]} base_diff_id=${diff_ids[0]}

for service in api web worker; do
    layers=("$base_layer") diff_ids=("$base_diff_id")
    root=$scratch/$service
    mkdir -p "$root/usr/local/bin"
    printf '#!/bin/sh\n. /etc/service.conf\necho "$name runs"\nexec sleep 1000000\n' >"$root/usr/local/bin/$service"
    chmod 0755 "$root/usr/local/bin/$service"
    add_layer "$root"
    write_image "layouts/$service" "{\"Entrypoint\":[\"/usr/local/bin/$service\"]}"
done
echo "$PWD/layouts"
