"""How tasks and updates move: the courier a workflow relies on, and the ways bytes travel."""

import os

# gRPC's core reads these when it is imported. Its own resolver asks name servers even for names that /etc/hosts knows, and waits for them;
# its handlers for forks are of no use, since no process that uses it forks without starting another program.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
