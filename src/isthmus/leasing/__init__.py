"""Leases: who holds what, where, until when; the ledger of it, and the loop that keeps it true."""

from isthmus.leasing.control import NodeControl
from isthmus.leasing.explaining import Explanation
from isthmus.leasing.leasing import Leasing
from isthmus.leasing.ledger import Ledger, LedgerError

__all__ = ["Explanation", "Leasing", "Ledger", "LedgerError", "NodeControl"]
