"""Operations reach MLflow in order, now or later: what can't be sent waits on disk, and nothing raises."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from orchestrate.redaction import redact
from orchestrate.spool import Operation, Spool, append_line
from orchestrate.tracking_store import MlflowException, RunStore

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
# MLflow's answers that no repetition changes.
REFUSALS = frozenset(
    ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
)


class Delivery:
    """Sends operations; while MLflow is away they wait, and it is asked again every ``RETRY_SECONDS``.

    Args:
        store: what does them.
        uri: for messages.
        spool: the file in which they wait; what MLflow refuses for good is kept beside it in ``<name>-refused.jsonl``.
    """

    def __init__(self, store: RunStore, uri: str, spool: Path) -> None:
        self._store = store
        self._uri = redact(uri)
        self._spool = Spool(spool)
        self._refused = self._spool.refused
        self._away_until: float | None = None  # monotonic seconds; None: MLflow answers
        self._lock = threading.RLock()

    def submit(self, do: str, key: str, **values: Any) -> str | None:
        """Do an operation, or keep it until MLflow is back; the result, if there is one yet."""
        operation: Operation = {"do": do, "key": key, **values}
        with self._lock:
            sent, result = False, None
            if self._send_waiting():
                sent, result = self._attempt(operation, again=False)
            if not sent:
                self._spool.append(operation)
            return result

    def flush(self) -> int:
        """Try at once to send what waits; how many operations still do."""
        with self._lock:
            self._send_waiting(at_once=True)
            return len(self._spool)

    def close(self) -> None:
        """Send what waits, or say where it is kept."""
        left = self.flush()
        if left:
            logger.warning(
                "MLflow at %s is still away: %d operations wait in %s and are sent when the study is next resumed",
                self._uri,
                left,
                self._spool.path,
            )

    def _send_waiting(self, at_once: bool = False) -> bool:
        """Send what waits, oldest first; whether nothing waits any more."""
        if not at_once and self._away_until is not None and time.monotonic() < self._away_until:
            return False
        done = 0
        for operation in self._spool:
            if not self._attempt(operation, again=True)[0]:
                break
            done += 1
        self._spool.drop_first(done)
        if done:
            logger.info("sent %d operations that had waited for MLflow at %s", done, self._uri)
        return len(self._spool) == 0

    def _attempt(self, operation: Operation, again: bool) -> tuple[bool, str | None]:
        """Whether the operation is dealt with (done, or refused for good), and its result."""
        try:
            result = self._store.perform(operation, again=again)
        except Exception as error:  # whatever it is, training goes on
            reason = redact(" ".join(str(error).split()))[:500]
            if not _is_outage(error):
                append_line(self._refused, operation)
                name, key = operation["do"], operation["key"]
                logger.warning("MLflow refused '%s' of run %s: %s; kept in %s", name, key, reason, self._refused)
                return True, None
            if self._away_until is None:
                logger.warning(
                    "MLflow at %s is away (%s): the study goes on, and what it logs waits in %s",
                    self._uri,
                    reason,
                    self._spool.path,
                )
            self._away_until = time.monotonic() + RETRY_SECONDS
            return False, None
        self._away_until = None
        return True, result


def _is_outage(error: Exception) -> bool:
    """Whether the same operation may succeed later."""
    if isinstance(error, MlflowException):
        return error.error_code not in REFUSALS
    return isinstance(error, OSError | SQLAlchemyError)
