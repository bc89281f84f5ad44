from urllib.parse import urlsplit

import pytest

from tests.support.servers.browser import browser, require_browser
from tests.support.servers.chat_page import Page, serving_at, write_models


@pytest.fixture(scope="session")
def browser_path():
    return require_browser()


@pytest.fixture(scope="module")
def chromium(browser_path):
    """A browser, for one file alone: while it runs, no other test of this process could call asyncio.run()."""
    with browser(browser_path) as running:
        yield running


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def serving(browser_path):
    """Starts further servers; asks for a browser, so that nothing is started where there is none."""
    return serving_at


@pytest.fixture(scope="session")
def server(serving, models):
    files = (part for name in ("talker", "hostile", "endless") for part in ("-m", models / f"{name}.gguf"))
    with serving(*files, "-c", "100000", "--cache-tokens", "100000") as address:
        yield address


@pytest.fixture
def opened(chromium, server):
    pages = []

    def make(model=None, address=server, wait=True, **options):
        pages.append(Page(chromium, address, **options))
        return pages[-1].open(model, wait)

    yield make
    for page in pages:
        page.context.close()
    assert [page.problems for page in pages] == [[] for _ in pages]
    assert {host for page in pages for host in page.hosts()} <= {urlsplit(page.address).netloc for page in pages}
