#!/bin/busybox sh
# First process of `hvhost rig exec`: this computer's root, read-only below a scratch overlay, and
# in it the command of /command. Its streams are virtio ports named in execute.py.
bb=/bin/busybox
$bb mkdir -p /proc /sys /dev /lower /scratch /root
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
while read -r module parameters; do
	$bb insmod "$module" $parameters || echo "hvhost: $module does not load"
done </modules
port() {
	for entry in /sys/class/virtio-ports/*; do
		if [ "$($bb cat "$entry/name" 2>/dev/null)" = "hvhost.$1" ]; then
			echo "/dev/${entry##*/}"
		fi
	done
}
fail() {
	echo "$1" >"$(port stderr)"
	echo 125 >"$(port status)"
	$bb sleep 1
	$bb poweroff -f
}
/bin/keep # as the agent does, before there is a second processor
for cpu in /sys/devices/system/cpu/cpu*/online; do echo 1 >"$cpu"; done
$bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /lower ||
	fail "hvhost: the computer's files could not be mounted in the rig"
$bb mount -t tmpfs -o size=75% scratch /scratch
$bb mkdir /scratch/upper /scratch/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work root /root ||
	fail "hvhost: the scratch overlay could not be mounted in the rig"
for directory in proc sys dev; do $bb mount --bind "/$directory" "/root/$directory"; done
$bb mkdir -p /root/dev/pts /root/dev/shm
$bb mount -t devpts pts /root/dev/pts
$bb mount -t tmpfs shm /root/dev/shm
$bb mount -t tmpfs run /root/run
$bb ip link set lo up 2>/dev/null
$bb cp /command /root/run/hvhost-command
echo started >"$(port status)"
# On any processor but the first, which must run no guest, see qemu.py.
$bb taskset "$(printf 0x%x $(((1 << $($bb nproc)) - 2)))" $bb chroot /root /bin/sh /run/hvhost-command <"$(port stdin)" >"$(port stdout)" 2>"$(port stderr)"
echo $? >"$(port status)"
$bb sleep 5 # until the reader of the status has ended this emulator
$bb poweroff -f
