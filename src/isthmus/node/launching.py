"""What an agent is told at its start: where its site is, and what only its environment may hold."""

import msgspec

from isthmus.core.settings import NodeSettings


def agent_url(site_url: str) -> str:
    """`http://HOST:PORT` -> `ws://HOST:PORT/agent`, where agents dial the site."""
    return site_url.replace("http", "ws", 1) + "/agent"


def rest_url(agent_url: str) -> str:
    """`ws://HOST:PORT/agent` -> `http://HOST:PORT`."""
    scheme, _, rest = agent_url.partition("://")
    return f"{'https' if scheme == 'wss' else 'http'}://{rest.removesuffix('/agent')}"


def secrets(join_key: bytes, settings: NodeSettings) -> dict[str, str]:
    """By environment, never on the command line, which every user of the machine can read."""
    return {
        "ISTHMUS_JOIN_KEY": join_key.hex(),
        "ISTHMUS_AGENT_SETTINGS": msgspec.json.encode(settings).decode(),
    }
