# Sets up a node's namespaces, and runs as long as the node does. When it ends, in whatever way, the kernel ends every
# process in them and removes the mounts, interfaces and iptables rules.
#
# Run by `unshare --net --mount --pid sh -e`, with the arguments OUTSIDE LINK OUTSIDE_IP IP SERVICES CGROUP. OUTSIDE is
# the network namespace at the other end of the veth pair.

# The first process of the PID namespace. It ends with this script, and all others end with it.
setpriv --pdeathsig KILL sleep infinity &

# One veth pair leads outside, to the host or to another node only. The route to the Services exists because a packet
# needs one before kube-proxy's rules rewrite its destination.
ip link add eth0 type veth peer name "$2" netns "$1"
nsenter --net="$1" ip address add "$3/30" dev "$2"
nsenter --net="$1" ip link set "$2" up
ip address add "$4/30" dev eth0
ip link set lo up
ip link set eth0 up
ip route add "$5" dev eth0

# What the parts write to fixed paths of the host goes to memory.
mount -t tmpfs tmpfs /run
mkdir /run/var /run/work
mount -t overlay -o lowerdir=/var,upperdir=/run/var,workdir=/run/work overlay /var

# The kubelet would change these settings for the whole machine, so it gets copies.
mount -t proc proc /proc
for name in kernel/keys/root_maxbytes kernel/keys/root_maxkeys kernel/panic kernel/panic_on_oops \
	vm/overcommit_memory vm/panic_on_oom; do
	copy=/run/$(basename "$name")
	cat "/proc/sys/$name" >"$copy"
	mount --bind "$copy" "/proc/sys/$name"
done

# The pods' cgroup. If a controller is missing, the kubelet reports it.
if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
	for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
		echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || true
	done
	mkdir "/sys/fs/cgroup/$6"
else
	for hierarchy in /sys/fs/cgroup/*/; do mkdir "$hierarchy$6"; done
fi

echo ready
wait
