# PID 1 of the workload, in the image: does what container runtimes do before they start one, and becomes it.
# No program of the image runs before that, and users are looked up in its files alone.

busybox=/dev/fledge/busybox
. /dev/fledge/settings.sh

fail() {
    echo "fledge: $*"
    exit 127
}

[ -s /etc/hosts ] || echo "127.0.0.1 localhost $hostname" 2>/dev/null >/etc/hosts
[ -s /etc/resolv.conf ] || echo "nameserver 10.0.2.3" 2>/dev/null >/etc/resolv.conf

# 'USER' or 'USER:GROUP', each a name or a number (image-spec, config.md, 'User'). Without a group it is that of
# passwd(5), 0 for a user who is not in it, and only then the groups count that name the user (group(5)).
name=${user%%:*} group=
case $user in *:*) group=${user#*:} ;; esac
name=${name:-0}
uid= gid=0 home=/ groups=
if [ -r /etc/passwd ]; then
    while IFS=: read -r entry _ number its_group _ its_home _ || [ "$entry" ]; do
        if [ "$entry" = "$name" ] || [ "$number" = "$name" ]; then
            name=$entry uid=$number gid=$its_group home=${its_home:-/}
            break
        fi
    done </etc/passwd
fi
if [ -z "$uid" ]; then
    case $name in *[!0-9]*) fail "the image has no user $name" ;; esac
    uid=$name name=
fi
is_found=
if [ -r /etc/group ]; then
    while IFS=: read -r entry _ number members || [ "$entry" ]; do
        if [ "$group" ]; then
            if [ "$entry" = "$group" ] || [ "$number" = "$group" ]; then
                gid=$number is_found=yes
                break
            fi
        elif [ "$name" ]; then
            case ",$members," in *",$name,"*) groups=$groups,$number ;; esac
        fi
    done </etc/group
fi
if [ "$group" ] && [ -z "$is_found" ]; then
    case $group in *[!0-9]*) fail "the image has no group $group" ;; esac
    gid=$group
fi

"$busybox" mkdir -p "$workdir"
cd "$workdir" || fail "there is no working folder $workdir"

if [ "$is_shell" ]; then
    exec 0<>/dev/ttyS0 1>&0 2>&0
    program=/bin/sh
    [ -x "$program" ] || program=$busybox
else
    exec </dev/null
    "$busybox" chown "$uid" /dev/console # so that it can open /dev/stdout
    program=$command
    case $command in
    */*) ;;
    *)
        set -f
        IFS=:
        for folder in $path; do
            program=${folder:-.}/$command
            [ ! -f "$program" ] || [ ! -x "$program" ] || break
        done
        unset IFS
        ;;
    esac
    [ -f "$program" ] && [ -x "$program" ] || fail "the image has no program $command"
fi
launch /dev/fledge/become "$uid,$gid$groups" "$program"
