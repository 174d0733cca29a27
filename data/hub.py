"""The Hugging Face hub where there is none: what was fetched before is used at once, and said."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger(__name__)

ANSWER_S = 5  # to connect: the libraries ask an absent hub six times, for half a minute
WAY_OUT = (
    "Without a network, take files of this machine (data.name=json data.data_files=corpus.jsonl), "
    "what was fetched before with HF_HOME naming its cache, or data=stdlib"
)


@contextmanager
def asked_once() -> Iterator[None]:
    """Inside, the libraries of Hugging Face take the hub for absent if it does not answer now."""
    import datasets.config
    from huggingface_hub import constants

    for library in ("datasets", "huggingface_hub"):  # they print in addition to the root logger
        logging.getLogger(library).handlers.clear()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and (reason := no_answer(constants.ENDPOINT)):
        log.warning(
            "%s cannot be reached (%s): taking what was fetched before from %s",
            constants.ENDPOINT,
            reason,
            constants.HF_HOME,
        )
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def no_answer(url: str) -> str | None:
    """Why nothing answers there; None where something does, or a proxy would have to be asked."""
    place = urlsplit(url)
    if place.scheme in getproxies() or place.hostname is None:
        return None
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname, port), ANSWER_S).close()
    except OSError as error:
        return str(error)
    return None
