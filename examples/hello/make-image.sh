#!/usr/bin/env bash
# Writes layouts/hello, an OCI layout of three layers around Debian's busybox-static.
cd "$(dirname "$0")"
. ../oci-layout.sh

umask 022
root=$scratch/root

busybox_root "$root"
mkdir -p "$root/www"
echo 'not for the public' >"$root/www/draft.html"
add_layer "$root"

rm -rf "$root"
mkdir -p "$root/etc" "$root/www"
echo hello >"$root/etc/hostname"
cat >"$root/etc/inittab" <<'EOF'
::sysinit:/bin/mount -t proc proc /proc
::sysinit:/bin/mount -t sysfs sysfs /sys
::respawn:/usr/local/bin/serve
::ctrlaltdel:/sbin/reboot
EOF
echo '<h1>Hello from a microVM</h1>' >"$root/www/index.html"
add_layer "$root"

rm -rf "$root"
mkdir -p "$root/usr/local/bin" "$root/www"
cat >"$root/usr/local/bin/serve" <<'EOF'
#!/bin/sh
exec httpd -f -p 8080 -h /www
EOF
chmod 0755 "$root/usr/local/bin/serve"
touch "$root/www/.wh.draft.html"
add_layer "$root"

write_image layouts/hello '{"Entrypoint":["/usr/local/bin/serve"],"Env":["PATH=/bin:/sbin:/usr/bin:/usr/sbin"],"WorkingDir":"/www","ExposedPorts":{"8080/tcp":{}}}'
echo "$PWD/layouts/hello"
