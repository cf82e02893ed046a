"""Durable calls: stored before they are acknowledged, run at least once, with one recorded result."""

from isthmus.services.jobs.jobs import Jobs
from isthmus.services.jobs.relay import Relay
from isthmus.services.jobs.slots import LeaseSource
from isthmus.services.jobs.store import CallStore

__all__ = ["CallStore", "Jobs", "LeaseSource", "Relay"]
