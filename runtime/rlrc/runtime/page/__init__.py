"""The operator's page of `rlrc run` and `rlrc serve`: in a process of its own, so that the loop hardly pays for it.

    page = Page(hello, cameras, address)          # process.py: starts it, and hands over what there is to show
    page.show({...}); page.picture(...)           # feed.py: never waits; what the page is too slow for is left out
    page.requests()                               # what operators want: stop, re-arm, other words, a bench

server.py answers browsers; static/ is the page itself, as it is sent.
"""
