"""Structured logs: JSON lines in `<state>/logs/site.log`, warnings also on stderr for who started it by hand.

The standard library's records (uvicorn, asyncio) take the same road, so that one file tells everything in
order.
"""

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog
from structlog.types import Processor

from isthmus.telemetry.redaction import redact_event

FILE_BYTES_MAX = 16 * 2**20
FILES_MAX = 3

_SHARED: list[Processor] = [
    structlog.stdlib.add_logger_name,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure(path: Path, level: int = logging.INFO) -> None:
    """Send all logs of this process to `path`, readable by its user only. Call once, at start."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    file = logging.handlers.RotatingFileHandler(path, maxBytes=FILE_BYTES_MAX, backupCount=FILES_MAX)
    file.setFormatter(_formatter(structlog.processors.JSONRenderer()))
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.ERROR)
    screen.setFormatter(_formatter(structlog.dev.ConsoleRenderer(colors=False)))
    logging.basicConfig(level=level, handlers=[file, screen], force=True)
    for chatty in ("uvicorn", "httpx", "asyncssh"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _formatter(renderer: Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            redact_event,
            renderer,
        ],
    )
