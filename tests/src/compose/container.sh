# shellcheck shell=bash
# $1: the container's directory. Runs as the first process of new mount and process namespaces.
set -eu
dir=$1
root=$dir/root
programs=() mounts=() secrets=() tmpfs=() inside=() words=() read_only=
# shellcheck source=/dev/null
source "$dir/inside"
# This /proc is the outer one: it tells who we are to those outside.
read -r pid _ </proc/self/stat
echo "$pid" >"$dir/pid.new"
mv "$dir/pid.new" "$dir/pid"

mount -t tmpfs -o mode=755 none "$root"
bound() {
    mkdir -p "$root$1"
    mount -o "bind,$2" "$1" "$root$1"
}
for top in /bin /sbin /lib /lib64; do
    if [ -L "$top" ]; then cp -a "$top" "$root/"; elif [ -d "$top" ]; then bound "$top" ro; fi
done
# Everything of /usr but what an image brings.
for part in /usr/*; do
    if [ "$part" != /usr/local ] && [ -d "$part" ] && [ ! -L "$part" ]; then bound "$part" ro; fi
done
bound /etc ro
mount -o bind "$dir/hosts" "$root/etc/hosts"
mkdir -p "$root/dev" "$root/proc"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"

file() {
    mkdir -p "$(dirname "$root$2")"
    touch "$root$2"
    mount -o bind,ro "$1" "$root$2"
}
for ((i = 0; i < ${#programs[@]}; i += 2)); do file "${programs[i]}" "${programs[i + 1]}"; done
for ((i = 0; i < ${#secrets[@]}; i += 2)); do file "${secrets[i]}" "${secrets[i + 1]}"; done
for ((i = 0; i < ${#tmpfs[@]}; i += 2)); do
    mkdir -p "$root${tmpfs[i]}"
    mount -t tmpfs -o "${tmpfs[i + 1]}" none "$root${tmpfs[i]}"
done
for ((i = 0; i < ${#mounts[@]}; i += 3)); do
    if [ -d "${mounts[i]}" ]; then
        mkdir -p "$root${mounts[i + 1]}"
    else
        mkdir -p "$(dirname "$root${mounts[i + 1]}")"
        touch "$root${mounts[i + 1]}"
    fi
    mount -o "${mounts[i + 2]}" "${mounts[i]}" "$root${mounts[i + 1]}"
done
if [ "$read_only" = 1 ]; then mount -o remount,ro "$root"; fi

# As an init does: hand signals on, and end with what the child ends with.
# With job control, for without it an interrupt would be ignored by what is started in the background.
set -m
"${inside[@]}" "${words[@]}" <&0 &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM
trap 'kill -INT "$child" 2>/dev/null || true' INT
code=0
while :; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break
done
exit "$code"
