"""``lictor tls``: node certificates for a cluster on real hosts. (``lictor cluster up`` makes its own.)"""

from __future__ import annotations

from pathlib import Path

from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag

DEFAULT_DIR = "tls"


def create_ca(args: Args) -> int:
    """Make the CA and the cluster key."""
    from node.errors import NodeError
    from node.pki import create_cluster_key, create_node_ca

    directory = Path(args.text("dir", DEFAULT_DIR))
    try:
        files = create_node_ca(directory)
        cluster_key = create_cluster_key(directory)
    except NodeError as error:
        raise CliError(str(error)) from None
    print(f"Made {files.ca} and {files.ca_key} (keep this one off the nodes)")
    print(f"Made {cluster_key} (servers only: it seals the certificate authority's key)")
    return 0


def create_cert(args: Args) -> int:
    """Issue a node's certificate."""
    from node.errors import NodeError
    from node.pki import issue_node_cert

    role = args.text("role")
    if args.on("server") or args.on("client"):
        typed = [word for word in ("server", "client") if args.on(word)]
        if len(typed) > 1 or (role and role != typed[0]):
            raise UsageError("lictor tls cert create: the role is given twice; give one of -server, -client, -role")
        role = typed[0]
    try:
        cert, key = issue_node_cert(
            Path(args.text("dir", DEFAULT_DIR)), args.text("node"), role or "client", args.text("dc", "dc1")
        )
    except NodeError as error:
        raise CliError(str(error)) from None
    print(f"Made {cert} and {key}: copy them, with ca.pem, into the node's tls_dir")
    return 0


_DIR = Flag("dir", f"where the files are (default ./{DEFAULT_DIR})", "DIR")
FAMILIES = {
    "tls": Family(
        "Make the node certificates of a cluster by hand",
        {
            "ca create": Command("Make the node CA and the cluster key", create_ca, (_DIR,)),
            "cert create": Command(
                "Make a node's key and certificate",
                create_cert,
                (
                    Flag("node", "the node's name, as in cluster.toml", "NODE", required=True),
                    Flag("role", "server or client (default client)", "ROLE"),
                    Flag("server", "the same as -role server", switch=True),
                    Flag("client", "the same as -role client", switch=True),
                    Flag("dc", "the datacenter (default dc1)", "DC"),
                    _DIR,
                ),
            ),
        },
    )
}
