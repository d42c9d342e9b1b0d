"""The operator's page of `rlrc run` and `rlrc serve`, in its own process so that it costs the loop little time.

process.py starts the process, feed.py connects it to the loop, control_page.py (`rlrc run`) and server_page.py (`rlrc
serve`) send what it shows and carry out operators' requests. In the page's process, loop_mirror.py receives and
server.py answers browsers. static/ contains the page.
"""
