#!/usr/bin/env bash
# Where no Docker engine is: run the steps of a Dockerfile in a bare Debian root, and its health check at the end, as root of a machine with debootstrap.
#   docker/try_in_debootstrap.sh [Dockerfile.cpu | Dockerfile]
#   ROOT         where the root is made, and removed again (default /tmp/debroot)
#   PIP_...      settings of pip that hold inside too; a folder PIP_FIND_LINKS is mounted there
# What stands for the base of FROM is Debian 12 with its own Python 3.11; of the repository the files of HEAD are copied.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)" root="${ROOT:-/tmp/debroot}" file="${1:-Dockerfile.cpu}"

# Files that the outside reaches the network by, devices, and the 2 GiB of shared memory that docker/README.md asks for.
furnish() {
  mkdir -p "$root"/{dev/shm,proc}
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  mount -t proc proc "$root/proc"
  for device in null zero full random urandom; do
    [ -c "$root/dev/$device" ] || { touch "$root/dev/$device" && mount --bind "/dev/$device" "$root/dev/$device"; }
  done
  mount -t tmpfs -o size=2g,mode=1777 tmpfs "$root/dev/shm"
  [ ! -d "${PIP_FIND_LINKS:-}" ] || { mkdir -p "$root$PIP_FIND_LINKS" && mount --bind "$PIP_FIND_LINKS" "$root$PIP_FIND_LINKS"; }
}

user=0 folder=/ environment=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8)
for name in "${!PIP_@}"; do environment+=("$name=${!name}"); done

inside() {
  local home
  home="$(chroot "$root" getent passwd "$user" | cut -d: -f6)"
  # shellcheck disable=SC2016  # the inner shell expands them
  chroot --userspec="$user" "$root" env -i HOME="$home" "${environment[@]}" sh -c 'cd "$0" && exec sh -c "$1"' "$folder" "$1"
}

step() {
  echo "--- $1 $2"
  case "$1" in
    RUN) inside "$2" ;;
    USER) user="$2" ;;
    WORKDIR) folder="$2" && mkdir -p "$root$folder" ;;
    COPY) git -C "$here/.." archive HEAD | tar -x -C "$root$folder" && chown -R 10001:10001 "$root$folder" ;;
    ENV) environment+=("${2//\$PATH//usr/local/bin:/usr/bin:/bin}") ;;
    HEALTHCHECK) inside "$(sed 's/.*CMD \[\(.*\)\]/\1/; s/",/"/g' <<<"$2")" ;;
    *) echo "(not run)" ;;
  esac
}

if [ "${INSIDE:-}" != 1 ]; then
  [ ! -e "$root" ] || { echo "$root: is there already; remove it, or set ROOT" >&2; exit 2; }
  trap 'rm -rf --one-file-system "$root"' EXIT
  debootstrap --variant=minbase bookworm "$root" >"$root.log" || { tail "$root.log" >&2; exit 1; }
  # Mounts end with their namespace, so that what removes the root meets none.
  INSIDE=1 unshare --mount --propagation private "$0" "$file"
  exit
fi
furnish
# debootstrap takes minutes to resolve what apt resolves in seconds.
inside "apt-get update && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"  # where a proxy has its own, it is among those that this machine trusts
while read -r word rest <&3; do
  case "$word" in
    "" | "#"*) ;;
    *) SECONDS=0; step "$word" "$rest"; echo "--- $SECONDS s" ;;
  esac
done 3<"$here/$file"
