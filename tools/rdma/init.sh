#!/bin/busybox sh
# First process of the guest: load the modules, stack the file systems, make the soft-RoCE device, run /command.
# Invariant: the line "guest: status N" is the last word of a guest that ran its command; any other end is a failure.

/bin/busybox --install -s /bin
export PATH=/bin

finish() { # a byte at port 0x501, the emulator's debug exit, ends it at once
    printf x | dd of=/dev/port bs=1 seek=1281 2>/dev/null
    poweroff -f
}

say() { echo "guest: $*"; }

need() { "$@" || { say "failed: $*"; finish; }; }

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do need insmod "/modules/$module"; done </modules/order

# The machine's own tree below, the unpacked fabric packages above it, memory on top. Nothing is ever written back.
share="trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000"
need mount -t 9p -o "$share" host /host
need mount -t 9p -o "$share" fabric /fabric
need mount -t tmpfs -o size=60% top /top
mkdir /top/upper /top/work
need mount -t overlay -o lowerdir=/fabric:/host,upperdir=/top/upper,workdir=/top/work overlay /root
mount --rbind /proc /root/proc
mount --rbind /sys /root/sys
mount --rbind /dev /root/dev
for place in tmp run dev/shm; do
    mkdir -p "/root/$place"
    mount -t tmpfs -o mode=1777 tmpfs "/root/$place"
done
mkdir -p /root/dev/pts /root/sys/fs/cgroup
# A checkout below one of the places just covered shows through again.
here=$(sed -n 's/^cd //p' /command)
case $here in
    /tmp/* | /run/* | /dev/shm/*)
        mkdir -p "/root$here" /top/checkout/upper /top/checkout/work
        need mount -t overlay -o "lowerdir=/host$here,upperdir=/top/checkout/upper,workdir=/top/checkout/work" overlay "/root$here"
        ;;
esac
mount -t devpts -o mode=620,ptmxmode=666 devpts /root/dev/pts
mount -t cgroup2 none /root/sys/fs/cgroup

hostname isthmus-guest
ip link set lo up
ip addr add 192.0.2.1/24 dev eth0
ip link set eth0 up
need chroot /root /usr/bin/rdma link add rxe0 type rxe netdev eth0
# A second network: a process in it is on another machine as far as the fabric can tell, and has the same device.
need chroot /root /bin/ip netns add peer
need chroot /root /bin/ip link add near type veth peer name far netns peer
ip addr add 198.51.100.1/24 dev near
ip link set near up
need chroot /root /bin/ip -n peer addr add 198.51.100.2/24 dev far
need chroot /root /bin/ip -n peer link set far up
need chroot /root /usr/bin/rdma link add rxe1 type rxe netdev near
say "up after $(cut -d' ' -f1 /proc/uptime) s, kernel $(uname -r)"

cp /command /root/run/command
chroot /root /usr/bin/env -i /bin/sh /run/command </dev/null
status=$?
say "command ended after $(cut -d' ' -f1 /proc/uptime) s"
say "status $status"
finish
