"""REST: nodes, functions seen, and what was used."""

from isthmus.core.api import BillRow, FunctionSummary, LicenseSummary
from isthmus.core.ids import NodeId
from isthmus.core.model import Node
from isthmus.gateway.operations import OPERATORS, Asked, Operation
from isthmus.leasing import Leasing
from isthmus.services.functions import Functions


class Nodes:
    def __init__(self, leasing: Leasing, functions: Functions) -> None:
        self._leasing = leasing
        self._functions = functions

    def operations(self) -> list[Operation]:
        node = "/v1/nodes/{node}"
        return [
            Operation("GET", "/v1/nodes", "Machines that can host leases", self.show_all, list[Node]),
            Operation(
                "POST",
                f"{node}/drain",
                "Give a node no new leases, end its leases in order",
                self.drain,
                list[Node],
                roles=OPERATORS,
            ),
            Operation(
                "POST", f"{node}/resume", "Give a node leases again", self.resume, list[Node], roles=OPERATORS
            ),
            Operation(
                "GET",
                "/v1/licenses",
                "What there is of licences, and who has them",
                self.licenses,
                list[LicenseSummary],
            ),
            Operation(
                "GET",
                "/v1/functions",
                "Functions that ran under your leases",
                self.functions,
                list[FunctionSummary],
            ),
            Operation("GET", "/v1/usage", "What your leases used, by class", self.usage, list[BillRow]),
        ]

    async def show_all(self, asked: Asked) -> list[Node]:
        return self._leasing.nodes()

    async def licenses(self, asked: Asked) -> list[LicenseSummary]:
        return self._leasing.licenses()

    async def drain(self, asked: Asked) -> list[Node]:
        await self._leasing.drain_node(NodeId(asked.path["node"]))
        return self._leasing.nodes()

    async def resume(self, asked: Asked) -> list[Node]:
        await self._leasing.resume_node(NodeId(asked.path["node"]))
        return self._leasing.nodes()

    async def functions(self, asked: Asked) -> list[FunctionSummary]:
        return self._functions.seen(asked.principal)

    async def usage(self, asked: Asked) -> list[BillRow]:
        return self._leasing.bill(asked.principal)
