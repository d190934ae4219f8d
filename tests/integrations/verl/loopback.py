"""Runs a command in a network namespace of its own that has nothing but the loopback interface.

    python loopback.py SECONDS FILE COMMAND...

Ray takes the address that leads outward and listens on all interfaces; here there is only 127.0.0.1. FILE gets the
namespace's name, by which the processes of the command are known. The command is ended after SECONDS, and when the
process that started this one has gone. It needs Linux, and root or user namespaces.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # <sched.h>
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # <linux/sockios.h>, <net/if.h>
libc = ctypes.CDLL(None, use_errno=True)


def unshare_network() -> None:
    """Leaves the network of this process. Whoever is not root becomes root of a user namespace first."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) == 0:
        return
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        sys.exit(
            f"no network namespace ({reason}): these tests let Ray run only where it sees 127.0.0.1 alone. Run them as "
            "root, or where user namespaces are allowed (sysctl user.max_user_namespaces)."
        )
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def start_loopback() -> None:
    """Switches the interface lo on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))


def namespace_of(process: int | str) -> str:
    """The name of a process' network namespace, such as "net:[4026532450]"; raises OSError if it is not ours to see."""
    return os.readlink(f"/proc/{process}/ns/net")


if __name__ == "__main__":
    seconds, file, *command = sys.argv[1:]
    unshare_network()
    start_loopback()
    Path(file).write_text(namespace_of("self"))
    # Both outlive the change of programs below.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.alarm(int(seconds))
    os.execvp(command[0], command)
