#!/fledge/busybox sh
# PID 1 of the initramfs: makes the guest ready, mounts the image, has the workload run in it, and tells how it ended.
# The host waits for the lines on the console that begin with 'fledge: '.

stop() {
    stty sane </dev/console # waits until all that was written is out (tcsetattr(3), TCSADRAIN)
    echo 0 >/proc/sys/kernel/printk # the host takes our last line for the last of all
    echo "fledge: $*"
    stty sane </dev/console
    reboot -f
}

mount -t devtmpfs dev /dev
echo "fledge: the guest is up"
. /fledge/settings.sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
dmesg -n 2

for module in /modules/*; do
    [ ! -e "$module" ] || insmod "$module" || stop "the kernel refuses the module $module"
done

hostname "$hostname"
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    # What QEMU's user network expects a guest to be (qemu(1), -netdev user).
    ip address add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    ip route add default via 10.0.2.2
fi

[ -b /dev/vda ] || stop "there is no disk: the kernel lacks virtio_mmio or virtio_blk"
if [ "$is_read_only" ]; then
    mount -t tmpfs tmpfs /upper && mkdir /upper/data /upper/work &&
        mount -t "$filesystem" -o ro /dev/vda /lower &&
        mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work image /image
else
    mount -t "$filesystem" -o rw /dev/vda /image
fi || stop "the image cannot be mounted as $filesystem"

for folder in proc sys dev; do
    [ -d /image/$folder ] || mkdir /image/$folder || stop "the image has no place for /$folder"
done
mount -t sysfs sysfs /image/sys
mount -t devtmpfs dev /image/dev
cd /image/dev || stop "the image has no /dev"
mkdir pts shm fledge
mount -t devpts -o mode=620,ptmxmode=666,gid=5 devpts pts
mount -t tmpfs -o mode=1777 tmpfs shm
ln -s /proc/self/fd fd
ln -s /proc/self/fd/0 stdin
ln -s /proc/self/fd/1 stdout
ln -s /proc/self/fd/2 stderr
cp /fledge/* fledge/
cd /

# Its own PID namespace makes the workload PID 1, as a container's is, and nothing of it survives its end.
echo "fledge: the workload starts"
unshare -m -p -f /fledge/busybox sh /fledge/enter.sh
stop "the workload ended with $?"
