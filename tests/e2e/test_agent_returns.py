"""An agent that was away when an instance was deregistered: calls to it end when the agent is back."""

from __future__ import annotations

import sys

from cli.client import Api
from cli.demo_stage import answers_plainly, app, wait_until
from tests.e2e.support_e2e import Mesh, a_free_port, running
from tests.support.promises import PATIENCE_S


def test_a_call_to_an_instance_that_went_meanwhile_ends_though_the_plan_leads_elsewhere(lictor: Mesh) -> None:
    port = a_free_port()
    server = Api(lictor.supervisor.http_addr("server-1"))

    def deregister(instance: str) -> None:
        for service in (f"{instance}-sidecar-proxy", instance):
            server.put("/v1/catalog/deregister", {"Node": "client-2", "ServiceID": service})

    redirect = {"Kind": "service-resolver", "Name": "leaver", "Redirect": {"Service": "elsewhere"}}
    with running([sys.executable, app("echo_server")], env=lictor.environment({"PORT": str(port)})):
        assert wait_until(lambda: answers_plainly(port), PATIENCE_S)
        for instance in ("leaver-1", "leaver-2"):
            lictor.stand("leaver", instance, port=port, host=1)
        lictor.stand("stayer", "stayer-1", upstreams="backend=leaver")
        lictor.lictor("intentions", "create", "stayer", "leaver", "-replace", host=0)
        address = lictor.upstream("stayer-1")
        assert wait_until(lambda: lictor.call(address).returncode == 0, PATIENCE_S)
        holding = [lictor.client("hold", address) for _ in range(6)]
        for each in holding:
            each.wait_line("holding", PATIENCE_S)

        # Nor does an instance's own sidecar hear that it is gone, or it would end its calls itself.
        lictor.cluster("kill", "client-1", "client-2")
        server.put("/v1/config", redirect)
        deregister("leaver-1")
        assert not any(line.startswith("ended") for each in holding for line in each.lines)
        lictor.cluster("start", "client-1")

        def ended() -> int:
            return sum(any(line.startswith("ended") for line in each.lines) for each in holding)

        assert wait_until(lambda: ended() == 3, PATIENCE_S), "those to the instance that went"
        deregister("leaver-2")
        assert wait_until(lambda: ended() == 6, PATIENCE_S), "they lived on until then"
        server.write("DELETE", "/v1/config/service-resolver/leaver")
        lictor.lictor("services", "deregister", "-id", "stayer-1", host=0)
        for each in holding:
            each.process.kill()
            each.finish()
