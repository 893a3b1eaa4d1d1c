"""The Hugging Face hub, from which models and tokenizers are loaded by name."""

from __future__ import annotations


def hub_reachable() -> bool:
    """Whether the hub answers a connection; behind a proxy nobody can tell, so yes is assumed.

    To be asked before loading: the hub's client retries for most of a minute before it believes that there is no network.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    url = urlsplit(constants.ENDPOINT)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=3.0).close()
    except OSError:
        return False
    return True
