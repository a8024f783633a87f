# PID 1 of the workload's namespaces: makes the image the root of what it sees. Unlike after a mere chroot(2),
# user namespaces can be made in it (user_namespaces(7)).
mount -t proc proc /image/proc
cd /image && mount -o move . / && exec chroot . /dev/fledge/busybox sh /dev/fledge/workload.sh
