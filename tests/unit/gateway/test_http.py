"""A socket that cannot be opened names the setting to change."""

import socket

import pytest

from isthmus.core.errors import SettingsError
from isthmus.core.settings import GatewaySettings
from isthmus.gateway.http import listen


def test_a_host_that_is_not_this_machine_is_the_hosts_fault() -> None:
    with pytest.raises(SettingsError, match=r"change gateway\.host"):
        listen(GatewaySettings(host="192.0.2.1"), 0)


def test_a_port_that_others_hold_is_the_ports_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=r"change gateway\.port"):
            listen(GatewaySettings(host="127.0.0.1", port=port), 0)
