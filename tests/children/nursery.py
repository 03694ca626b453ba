"""`python -m nursery FD`: a process that has imported what servers import, and forks a server whenever it is told.

Those imports take seven seconds of a core, and here they are made once for all servers of a test process, which holds
the other end of the socket FD (`tests/nursery.py`). A server is a child of the process that asked, as if that had
started it, and of its session, environment and files; from there on it is a `prepared_server`.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import prepared_server

MESSAGE = 1 << 17  # bytes


def born(orders: socket.socket) -> None:
    """Returns in each server, with its arguments in `sys.argv`; ends this process when nobody is left to ask.

    An order is the server's arguments, environment and directory, with its three standard files. The answer is its pid,
    sent once the process that forked it is gone: by then it is a child of whoever adopts orphans.
    """
    while True:
        message, files, _, _ = socket.recv_fds(orders, MESSAGE, 3)
        if not message:
            raise SystemExit
        ours, its = socket.socketpair()
        if between := os.fork():
            its.close()
            os.waitpid(between, 0)
            orders.send(ours.recv(64))
            ours.close()
            for file in files:
                os.close(file)
            continue
        if pid := os.fork():
            its.send(str(pid).encode())
            os._exit(0)
        for end in (orders, ours, its):
            end.close()
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        order = json.loads(message)
        os.chdir(order["directory"])
        prepared_server.set_environment(order["environ"])
        sys.argv[1:] = order["arguments"]
        return


if __name__ == "__main__":
    prepared_server.prepare()
    born(socket.socket(fileno=int(sys.argv[1])))
    prepared_server.serve()
