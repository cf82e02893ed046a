#!/bin/sh
# Run a command as a plain user with a systemd of his own, as a login would: session.sh COMMAND ...
# The user's group is what Debian's user@.service delegates (pids, memory, cpu; no cpuset). What is missing of a
# real login is systemd as the first process. The one right beyond a plain user's is to read the checkout.
set -eu
user=1 # `daemon`: every Debian has it
group=/sys/fs/cgroup/user@$user.service
export XDG_RUNTIME_DIR=/run/user/$user HOME=/tmp/user
mkdir -p "$XDG_RUNTIME_DIR" "$HOME" "$group" /run/systemd/system # without the last it refuses to start
chown $user "$XDG_RUNTIME_DIR" "$HOME"
chmod 700 "$XDG_RUNTIME_DIR"
echo "+pids +memory +cpu" >/sys/fs/cgroup/cgroup.subtree_control
mkdir "$group/session"
for place in "$group" "$group/session"; do
    chown $user "$place" "$place/cgroup.procs" "$place/cgroup.subtree_control" "$place/cgroup.threads"
done
as_user() { # GROUP COMMAND ...
    echo 0 >"$1/cgroup.procs"
    shift
    exec setpriv --reuid $user --regid $user --clear-groups --inh-caps +dac_read_search \
        --ambient-caps +dac_read_search --no-new-privs "$@"
}
(as_user "$group" /lib/systemd/systemd --user --log-target=console --log-level=warning) &
manager=$!
tries=0
until (as_user "$group/session" busctl --user status) >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 40 ] || { echo "the user's systemd did not come up" >&2; exit 1; }
    sleep 0.2
done
status=0
(as_user "$group/session" "$@") || status=$?
kill $manager
wait $manager || true
exit $status
