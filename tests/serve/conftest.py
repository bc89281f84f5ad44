"""The server of a file of tests, and a client of each vendor for it.

A file says in SETTINGS what its server runs with; one whose server has other models has a fixture `server` of its own.
"""

import pytest

from tests.support.servers import vendor_clients
from tests.support.servers.http_server import running


@pytest.fixture(scope="module")
def server(request):
    with running(**getattr(request.module, "SETTINGS", {})) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    with vendor_clients.openai_client(server) as one:
        yield one


@pytest.fixture(scope="module")
def anthropic_client(server):
    with vendor_clients.anthropic_client(server) as one:
        yield one
