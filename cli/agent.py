"""``lictor agent``: one node, server or client, in the foreground."""

from __future__ import annotations

from cli.errors import CliError
from cli.flags import Args, Command, Family, Flag


def run(args: Args) -> int:
    """Run the node until a signal ends it."""
    from node.config import load_config
    from node.errors import NodeError
    from node.main import run_agent

    try:
        config = load_config(args.text("config"))
        return run_agent(config, config.node(args.text("node")))
    except NodeError as error:
        raise CliError(str(error)) from None


FAMILIES = {
    "agent": Family(
        "Run one node",
        alone=Command(
            "Run one node of a cluster, server or client, as cluster.toml says",
            run,
            (
                Flag("config", "the cluster's file", "FILE", required=True, aliases=("config-file",)),
                Flag("node", "which node of the file", "NODE", required=True),
            ),
        ),
    )
}
